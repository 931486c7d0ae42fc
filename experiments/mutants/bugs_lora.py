"""Mutants of the LoRA as a value, its merging and its binding."""

from experiments.mutants.mutant import bugs

_AREA = "LoRA and forward"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.hypernet.lora:Lora.l1",
        "losses",
        ("l1-of-a-alone", " + self.B[name].abs().mean()", "", "B is not kept small"),
        (
            "l1-summed-over-modules",
            "for name in self.A]).mean()",
            "for name in self.A]).sum()",
            "grows with the targets",
        ),
        ("l1-is-l2", "self.A[name].abs().mean()", "self.A[name].square().mean()", "another penalty than configured"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:Lora.__getitem__",
        "lora",
        (
            "always-the-first-context",
            "slice(index, index + 1)",
            "slice(0, 1)",
            "another document's adapter is exported",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:merge_chunks",
        "lora",
        (
            "bias-in-the-padding",
            "*[n + 1] * (longest - count)",
            "*[n] * (longest - count)",
            "short documents get the shared LoRA several times, depending on their neighbours",
        ),
        (
            "padding-is-the-last-chunk",
            "*[n + 1] * (longest - count)",
            "*[n - 1] * (longest - count)",
            "short documents get another document's chunk",
        ),
        (
            "chunks-of-the-first-context",
            "*range(end - count, end)",
            "*range(count)",
            "every context gets the first document's chunks",
        ),
        (
            "first-chunk-repeated",
            "*range(end - count, end)",
            "*[end - count] * count",
            "long documents are known by their first chunk only",
        ),
        (
            "last-chunk-lost",
            "[*range(end - count, end), n,",
            "[*range(end - count, end - (count > 1)), n, *[n + 1] * (count > 1),",
            "the end of long documents is not learnt",
        ),
        ("bias-b-lost", "bias.B[name] if bias else None", "None", "the shared LoRA has no effect and never learns"),
        (
            "bias-twice",
            "(end - count, end), n,",
            "(end - count, end), n, n,",
            "the shared LoRA has twice its weight and the rank is larger",
        ),
        (
            "scale-over-chunks",
            "chunks.scale, bias.rank",
            "chunks.scale / longest, bias.rank",
            "a document's LoRA depends on its neighbours' length",
        ),
        (
            "chunks-detached-but-the-first",
            "table = torch.cat([blocks,",
            "table = torch.cat([blocks[:1], blocks[1:].detach(),",
            "only the first chunk of a row trains the hypernetwork",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:bind",
        "lora",
        (
            "delta-divided-by-rank",
            "_Slot(module, a, b, lora.scale, lengths)",
            "_Slot(module, a, b, lora.scale / lora.rank, lengths)",
            "the delta depends on the longest document of the row",
        ),
        (
            "bound-in-reverse-order",
            "zip(modules, lora.A[name].unbind(1)",
            "zip(reversed(modules), lora.A[name].unbind(1)",
            "each layer gets the LoRA of the one opposite, and exports differ",
        ),
        (
            "last-module-unbound",
            "for name, modules in targets.items()\n",
            "for name, modules in list(targets.items())[: max(1, len(targets) - 1)]\n",
            "one of several target modules is never adapted",
        ),
        (
            "last-layer-unbound",
            "strict=True)\n    ]",
            "strict=True)\n        if module is not modules[-1]\n    ]",
            "the last layer is never adapted",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:_Slot.add_delta",
        "lora",
        (
            "scale-lost-for-unequal-contexts",
            "piece @ a.mT * self.scale",
            "piece @ a.mT",
            "the LoRA's strength depends on how rows are packed",
        ),
        (
            "contexts-swapped",
            "A.unbind(), B.unbind(),",
            "A.unbind()[::-1], B.unbind()[::-1],",
            "questions are answered under another document's LoRA",
        ),
        (
            "base-path-detached",
            "return (output + delta",
            "return (output.detach() + delta",
            "no gradient through the base",
        ),
        (
            "delta-input-detached",
            "tokens, A, B = x.flatten",
            "tokens, A, B = x.detach().flatten",
            "a layer's LoRA does not learn what later LoRAs make of it",
        ),
        (
            "delta-negated",
            "return (output + delta",
            "return (output - delta",
            "exports and answers have the other sign",
        ),
        (
            "first-token-without-lora",
            "return (output + delta.reshape(output.shape))",
            "delta[0] = 0\n        return (output + delta.reshape(output.shape))",
            "the first token of a row is not adapted",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:_Slot.add_delta",
        "binding",
        (
            "scale-lost-for-equal-contexts",
            "alpha=self.scale",
            "alpha=1.0",
            "the LoRA's strength depends on how rows are packed",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:_row_lengths",
        "binding",
        (
            "rows-of-another-context",
            "for count in counts)",
            "for count in counts[::-1])",
            "answers with another LoRA",
            "equivalent: whatever binds by rows gives every context as many of them",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:_token_lengths",
        "binding",
        ("contexts-in-reverse", "return counts", "return counts[::-1]", "questions are answered under another LoRA"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:checkpoint_contexts",
        "binding",
        (
            "recompute-at-half-scale",
            "nullcontext(), _Activation(_active.get())",
            "nullcontext(), _Activation([replace(slot, scale=slot.scale / 2) for slot in _active.get()])",
            "with checkpointing gradients are those of another LoRA",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:_Activation.__exit__",
        "lora",
        (
            "binding-never-ends",
            "self._opened.pop().close()",
            "self._opened.pop()",
            "the encoder reads the next documents under the last LoRA",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:_Activation.__enter__",
        "lora",
        (
            "hooks-accumulate",
            "undo.callback(slot.module.register_forward_hook(partial(_add_delta, opening, slot)).remove)",
            "slot.module.register_forward_hook(partial(_add_delta, opening, slot))",
            "every step keeps its LoRAs and their graph alive: slower, then out of memory",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:_add_delta",
        "binding",
        (
            "nested-bindings-add-up",
            "if _active.get() is not opening:",
            "if not _active.get():",
            "two LoRAs at once",
            "outside the claims: nothing in d2l opens a binding within another",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.lora:_add_delta",
        "lora",
        (
            "base-forward-bypassed",
            "    return slot.add_delta(args[0], output)",
            "    return slot.add_delta(args[0], nn.functional.linear(args[0], module.weight))",
            "a target's own forward and its bias are bypassed",
        ),
    ),
]
