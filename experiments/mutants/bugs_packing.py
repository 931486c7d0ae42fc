"""Mutants of packing, epochs and the cache."""

from experiments.mutants.mutant import bugs

_AREA = "data"
_CHUNKS = "chunks = [chunk for row in rows for chunk"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.data.packing:PackedBatch.label_positions",
        "batches",
        ("last-label-of-a-row-lost", ".nonzero().squeeze(-1)", ".nonzero().squeeze(-1)[:-1]", "a stop token is lost"),
        (
            "first-label-of-a-row-lost",
            ".nonzero().squeeze(-1)",
            ".nonzero().squeeze(-1)[1:]",
            "an answer's beginning is lost",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.packing:PackedBatch.prediction_positions",
        "batches",
        ("predictions-not-shifted", "self.label_positions - 1", "self.label_positions", "each token predicts itself"),
        ("predictions-two-back", "self.label_positions - 1", "self.label_positions - 2", "the token after next"),
    ),
    *bugs(
        _AREA,
        "d2l.data.packing:collate",
        "batches",
        (
            "documents-in-reverse-order",
            _CHUNKS,
            "chunks = [chunk for row in rows[::-1] for chunk",
            "questions about other documents",
        ),
        (
            "document-of-the-row-before",
            _CHUNKS,
            "chunks = [chunk for row in [*rows[-1:], *rows[:-1]] for chunk",
            "questions about other documents",
        ),
        (
            "documents-lost-but-the-first",
            "ctx_ids=_laid_out(chunks)",
            "ctx_ids=_laid_out([chunks[0][:1] * len(chunk) for chunk in chunks])",
            "documents are a repeated token",
        ),
        (
            "everything-supervised",
            "labels=_laid_out([query.labels for",
            "labels=_laid_out([query.input_ids for",
            "most of the loss is about questions",
        ),
        (
            "teacher-in-half-precision",
            "dtype=torch.float32)",
            "dtype=torch.float16).float()",
            "log-probabilities are rounded",
            "outside the claims: rounding of 0.05 percent, less than that of a teacher in bfloat16",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.packing:PackedBatches.__getitem__",
        "batches",
        (
            "last-row-of-a-batch-lost",
            "for row in self._groups[index]]",
            "for row in self._groups[index][:-1] or self._groups[index]]",
            "rows are never seen",
        ),
        (
            "first-row-of-a-batch-twice",
            "for row in self._groups[index]]",
            "for row in [*self._groups[index][:1], *self._groups[index]]]",
            "rows are seen twice, and batches exceed their limits",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.packing:pack",
        "batches",
        (
            "one-batch-lost",
            "generator.permutation(len(groups)))",
            "generator.permutation(len(groups))[: max(1, len(groups) - 1)])",
            "a batch of every epoch is never seen",
        ),
        ("packing-seed-ignored", "default_rng(seed)", "default_rng(0)", "the same batches in every epoch"),
        (
            "oversized-rows-unreported",
            "for row in np.flatnonzero(~fits))",
            "for row in np.flatnonzero(~fits)[:0])",
            "rows that fit no batch are dropped, unreported",
        ),
        (
            "rows-that-just-fit-dropped",
            "table <= budgets",
            "table <= 0.8 * budgets",
            "rows that nearly fill a batch are dropped as too long",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.packing:_first_fit_decreasing",
        "batches",
        (
            "document-budget-ignored",
            " & (free_ctx[:, : opened + 1] >= ctx[:, None])",
            "",
            "batches exceed max_packed_ctx_len: out of memory on the real model",
        ),
        (
            "question-budget-ignored",
            "(free_inp[:, : opened + 1] >= inp[:, None]) & ",
            "",
            "batches exceed max_packed_inp_len: out of memory on the real model",
        ),
        (
            "one-row-a-batch",
            "bin_ids = room.argmax(axis=1)",
            "bin_ids = np.full(n_windows, opened)",
            "batches are nearly empty: many times the steps for an epoch",
            "outside the claims: every row is trained once; only the fill is worse, which benchmarks measure",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.epochs:epoch_batches",
        "batches",
        ("epoch-ignored", "seed=config.seed + epoch", "seed=config.seed", "the same batches in every epoch"),
        (
            "budgets-swapped",
            "pack(sizes, config.max_packed_inp_len, config.max_packed_ctx_len,",
            "pack(sizes, config.max_packed_ctx_len, config.max_packed_inp_len,",
            "batches exceed max_packed_inp_len",
        ),
        ("stage-rows-ignored", "[[among[row] for row in group]", "[[row for row in group]", "always the first stage"),
    ),
    *bugs(
        _AREA,
        "d2l.data.cache:key_parts",
        "cache",
        ("key-without-answers", "record.prompts, record.responses,", "record.prompts,", "old answers after an edit"),
        ("key-without-documents", "(record.context, record", "(record", "old documents after an edit"),
        (
            "key-without-questions",
            "record.prompts, record.responses,",
            "record.responses,",
            "old questions after an edit",
        ),
        (
            "key-without-teacher",
            ", record.logprobs_vals, record.logprobs_indices)",
            ",)",
            "another teacher's logprobs after an edit",
        ),
        ("key-without-tokenizer", "chat.tokenizer_fingerprint", '"any"', "ids of another tokenizer"),
        ("key-without-template", "chat.fingerprint", '"any"', "old labels after an edit of the template"),
        ("key-without-chunk-limits", "json.dumps(asdict(limits))", "str(limits.max_qas_len)", "chunks of another run"),
        ("key-without-seed", "str(seed)", '"any"', "another seed's chunks"),
    ),
    *bugs(
        _AREA,
        "d2l.data.chat.format:ChatFormat.fingerprint",
        "cache",
        (
            "fingerprint-without-date",
            "self.supervision, self.current_date)",
            "self.supervision)",
            "a cached prompt holds another date",
        ),
        (
            "fingerprint-without-supervision",
            "(self.template, self.supervision, self",
            "(self.template, self",
            "labels of another convention",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.cache:cached_rows",
        "cache",
        (
            "cached-chunks-never-drawn",
            "tokenize_record(index, records[index], chat, limits, seed)",
            "tokenize_record(index, records[index], chat, limits, None)",
            "num_chunk_probs has no effect with a cache",
        ),
        (
            "cached-drops-unreported",
            "failed + [shard.read_dropped(records) for shard in shards]",
            "failed",
            "fewer questions than the file has, unreported",
        ),
        (
            "records-of-the-first-shard",
            "tokenize_record(index, records[index]",
            "tokenize_record(index, records[index % RECORDS_PER_SHARD]",
            "all but the first thousand records are replaced by these",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.cache:_Store.read",
        "cache",
        (
            "damaged-shards-used",
            " and _hash_file(path).items() <= self._shards[path.name].items()",
            "",
            "rows of a damaged file are trained",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.shards:Shard.sizes",
        "cache",
        (
            "cached-sizes-swapped",
            'self._columns["input_ids"].sizes, self._columns["chunks"].sizes',
            'self._columns["chunks"].sizes, self._columns["input_ids"].sizes',
            "batches of cached rows exceed their limits",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.shards:MappedRows.__getitem__",
        "cache",
        ("off-by-one-at-shards", 'side="right"', 'side="left"', "rows at the edge of a shard are others"),
    ),
    *bugs(
        _AREA,
        "d2l.data.shards:Shard.row",
        "cache",
        ("cached-teacher-lost", "vals or None, indices or None", "None, None", "the run ends, or trains without it"),
    ),
]
