"""Mutants of what only large matrices, some GPUs or a base's own settings run; most were planted blind."""

from experiments.mutants.mutant import bugs

MUTANTS = [
    *bugs(
        "optimizer and schedule",
        "d2l.train.optimizer:_of_one_shape",
        "stacks",
        (
            "matrices-beyond-a-stack-never-stepped",
            "groups.append(group)",
            "groups += [] if len(groups) >= len(latest) else [group]",
            "of many matrices of one shape, most never learn",
        ),
    ),
    *bugs(
        "LoRA and forward",
        "d2l.hypernet.lora:_Slot.add_delta",
        "grouped_lora",
        (
            "scale-lost-in-grouped-products",
            "offs=ends) * self.scale",
            "offs=ends)",
            "on newer GPUs the LoRA is of another strength where contexts are of unequal lengths",
        ),
        (
            "grouped-products-without-the-base",
            "return output + functional",
            "return functional",
            "on newer GPUs the target's own output is lost",
        ),
    ),
    *bugs(
        "LoRA and forward",
        "d2l.hypernet.lora:_ends",
        "grouped_lora",
        (
            "contexts-end-a-token-early",
            "[*accumulate(lengths)]",
            "[*(end - 1 for end in accumulate(lengths[:-1])), sum(lengths)]",
            "on newer GPUs the last token of a context takes the next one's LoRA",
        ),
    ),
    *bugs(
        "hypernetwork",
        "d2l.hypernet.perceiver:_blocks",
        "lora",
        (
            "blocks-share-nothing",
            "[Layer(shape, cross=True), *first[1:]] * others",
            "[layer for _ in range(others) for layer in block()]",
            "shared_weights has no effect",
        ),
    ),
    *bugs(
        "base",
        "d2l.base.grouped:_with_copies",
        "grouped",
        (
            "few-routes-of-other-tokens",
            "hidden_states.repeat_interleave(indices.shape[1], dim=0)",
            "hidden_states.repeat(indices.shape[1], 1)",
            "on a GPU two answers at once read each other",
        ),
    ),
    *bugs(
        "answers",
        "d2l.inference.generate:generate",
        "answers",
        ("the-base-penalizes-repetitions", "        repetition_penalty=1.0,\n", "", "the base's files change answers"),
        ("the-base-forbids-repetitions", "        no_repeat_ngram_size=0,\n", "", "the base's files cut answers off"),
        ("the-base-samples", "        do_sample=False,\n", "", "answers differ from time to time"),
    ),
]
