"""Doc-to-LoRA: from a configuration to a trained hypernetwork, and from a document to an adapter.

The floors of the house, from the ground up. A room (a folder or module here) imports from the floors below its own
only; `make layers` draws what is imported, and a test holds it against this list.

    errors
    io
    config
    base
    data
    hypernet
    checkpoint  fingerprint
    build
    train  inference  reference
    evaluation
    tiny
"""
