"""Mutants of how documents are cut into chunks, and of the documents that are generated."""

from experiments.mutants.mutant import bugs

_AREA = "data"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.data.chunks:_Cutting._fits",
        "cuts",
        (
            "least-length-of-the-longest-chunk",
            "min(lengths) >= self.limits.min_ctx_chunk_len",
            "max(lengths) >= self.limits.min_ctx_chunk_len",
            "chunks of a few tokens are drawn, which say nothing",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.chunks:_Cutting._beginning",
        "cuts",
        (
            "overlap-ignored",
            "max(end - self.limits.chunk_overlap, 0)",
            "end",
            "what a border cuts apart is in no chunk whole",
        ),
        (
            "overlap-of-whole-words-at-most",
            "if (first := places[bisect_left(places, earliest)]) < end:",
            "if (first := places[bisect_left(places, earliest)]) <= end:",
            "where no sentence fits into the overlap there is none",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.division:EqualDivision.ends",
        "cuts",
        (
            "one-chunk-too-many",
            "step = math.ceil(self.length / count)",
            "step = max(1, self.length // count)",
            "documents have a chunk more than drawn, of a few tokens",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.division:PlacedDivision.ends",
        "cuts",
        (
            "places-far-from-equal",
            "at = min(range(first, furthest + 1), key",
            "at = max(range(first, furthest + 1), key",
            "chunks are as unequal as their limit allows",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.data.needles:needle_records",
        "needles",
        (
            "least-filler-ignored",
            "generator.randint(min_filler_words, filler_words)",
            "filler_words",
            "all needles have the same length",
        ),
    ),
]
