"""Mutants of held-out documents: which they are, how they are scored, and when a run is evaluated on which of them."""

from experiments.mutants.mutant import bugs

_AREA = "held-out evaluation"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.train.losses:context_losses",
        "heldout",
        (
            "heldout-sums-for-means",
            "return sums / torch.bincount(context, minlength=len(queries)).clamp(min=1)",
            "return sums",
            "the gap between documents grows with the length of answers",
        ),
        (
            "heldout-questions-of-the-document-before",
            "torch.repeat_interleave(queries).to",
            "torch.repeat_interleave(queries).roll(1).to",
            "a document's loss is that of another's question too",
        ),
        (
            "heldout-mean-over-questions",
            "torch.bincount(context, minlength=len(queries))",
            "queries.to(logits.device)",
            "documents with long answers count as worse answered",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.heldout:HeldoutScores.gaps",
        "heldout",
        (
            "gap-beside-another-document",
            "zip(own, other, strict=True)",
            "zip(own[1:] + own[:1], other, strict=True)",
            "the error of the gap holds how much documents differ, so that documents seem not to be read",
        ),
        ("gap-negated", "[theirs - mine for", "[mine - theirs for", "a run that reads its documents is said not to"),
    ),
    *bugs(
        _AREA,
        "d2l.train.heldout:HeldoutScores.gap_error",
        "heldout",
        (
            "gap-error-is-the-deviation",
            " / len(self.gaps) ** 0.5",
            "",
            "documents seem not to be read, whatever their number",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.heldout:_joined",
        "heldout",
        (
            "heldout-loss-of-the-last-batch",
            "sum(it.loss for it in parts)",
            "parts[-1].loss",
            "the held-out loss falls with the number of batches",
        ),
        (
            "heldout-exact-match-of-the-best-batch",
            "sum(it.exact_match for it in parts)",
            "max(it.exact_match for it in parts)",
            "held-out documents seem answered less than they are",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.heldout:Heldout._loras",
        "heldout",
        (
            "own-lora-as-another's",
            "_joined_loras(before, lora[:-1])",
            "lora",
            "no gap: every run seems not to read its documents",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.heldout:_joined_loras",
        "heldout",
        (
            "other-lora-at-scale-one",
            "Lora(A, B, first.scale)",
            "Lora(A, B, 1.0)",
            "another document's LoRA is scored weaker than the own one: a gap without reading",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.heldout:Heldout.evaluate",
        "heldout",
        (
            "distances-with-the-bias",
            "compare_updates(lora, others, self._model.hypernet.bias())",
            "compare_updates(lora, others)",
            "documents that are told apart seem alike, because all share the bias",
        ),
        (
            "base-scored-under-another's-lora",
            '"other": others, "none": None}',
            '"other": others, "none": others}',
            "the loss without a LoRA is no loss without one",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.heldout:Heldout._answer",
        "heldout",
        (
            "heldout-average-ignored",
            "use_per_ctx_average_loss=per_context",
            "use_per_ctx_average_loss=False",
            "the held-out loss is another mean than that of training",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.distance:_without",
        "heldout",
        (
            "distances-with-twice-the-bias",
            "-shared.B[name].double()",
            "shared.B[name].double()",
            "documents that are told apart seem alike, because all share the bias",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.distance:UpdateProducts.distance",
        "heldout",
        (
            "distance-of-half-the-angle",
            "2 - 2 * between / sqrt",
            "2 - between / sqrt",
            "LoRAs that are all alike seem to differ: that documents are not read is never said",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.distance:mean_distance",
        "heldout",
        (
            "module-distances-are-the-total",
            "modules or tuple(pair.between)",
            "tuple(pair.between)",
            "a module whose LoRAs are all alike is not seen",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.watch:Watch.evaluate",
        "evaluated_run",
        (
            "evaluated-on-the-last-stage",
            "min(trainer.curriculum.stage, len(self._heldout) - 1)",
            "len(self._heldout) - 1",
            "held-out scores are of documents that are not trained yet",
        ),
        (
            "evaluated-on-the-first-stage",
            "min(trainer.curriculum.stage, len(self._heldout) - 1)",
            "0",
            "held-out scores are of documents of an earlier stage",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.watch:Watch._is_due",
        "evaluated_run",
        (
            "last-step-not-evaluated",
            " or step == config.max_steps)",
            ")",
            "the weights that a run ends with have no score",
        ),
        (
            "evaluated-a-step-late",
            "step % (config.eval_steps or 1) == 0",
            "(step - 1) % (config.eval_steps or 1) == 0",
            "scores of other steps than configured",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.train.watch:Watch.observe",
        "evaluated_run",
        (
            "evaluation-reported-again",
            "else {}",
            "else self.evaluation",
            "trackers show scores of earlier weights at every step",
            "outside the claims: what trackers are sent is judged by no check; tests hold it",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.build:heldout_records",
        "evaluated_run",
        (
            "heldout-needles-of-training",
            '2 * config.eval_documents, "heldout")',
            '2 * config.eval_documents, "train")',
            "held-out documents are those that are trained on",
        ),
        (
            "heldout-needles-of-the-first-stage",
            "_stage_needles(config, number,",
            "_stage_needles(config, 0,",
            "later stages are evaluated on easier documents",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.heldout:choose_heldout",
        "kept_out",
        (
            "copies-of-heldout-documents-trained",
            "frozenset(index for index, record in enumerate(records) if record.context in chosen)",
            "frozenset({r.context: i for i, r in enumerate(records) if r.context in chosen}.values())",
            "a document that the file has twice is evaluated and trained on",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.shards:SomeRows.sizes",
        "kept_out",
        (
            "rows-packed-by-sizes-of-others",
            "[np.asarray(self._places)]",
            "[: len(self._places)]",
            "beside held-out documents, packed rows exceed their budgets",
        ),
    ),
]
