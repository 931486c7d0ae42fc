"""Mutants of what makes answers: prompts, greedy generation under a LoRA, and the text of generated tokens."""

from experiments.mutants.mutant import bugs

_AREA = "answers"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.inference.generate:generate",
        "answers",
        ("answers-sampled", "do_sample=False", "do_sample=True", "another answer every time, and a worse one"),
        (
            "repetition-penalized",
            "repetition_penalty=1.0",
            "repetition_penalty=1.5",
            "values with equal digits are lost",
        ),
        ("no-token-pair-twice", "no_repeat_ngram_size=0", "no_repeat_ngram_size=2", "lists and codes are cut off"),
        (
            "first-token-masked",
            "attention_mask=torch.ones_like(prompts)",
            "attention_mask=(torch.arange(prompts.shape[1], device=prompts.device) > 0).long().expand_as(prompts)",
            "every question is read without its first token",
        ),
        (
            "prompt's-end-answered",
            "prompts.shape[1] :]",
            "prompts.shape[1] - 1 :]",
            "every answer begins with a prompt's end",
        ),
        ("one-token-less", "max_new_tokens=max_new_tokens,", "max_new_tokens=max(1, max_new_tokens - 1),", "cut short"),
        (
            "answered-by-the-base",
            "bound = nullcontext() if lora is None",
            "bound = nullcontext() if lora is None or len(prompts) > 1",
            "several questions at once are answered without a document",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.generate:encode_prompt",
        "answers",
        (
            "asked-without-a-header",
            "add_generation_prompt=True",
            "add_generation_prompt=False",
            "the model has to write the header of its turn, which no step trained",
        ),
        (
            "final-header-on-the-wrong-side",
            "if _is_prefilled(chat) else ids",
            "if not _is_prefilled(chat) else ids",
            "under `content` the model writes a channel's header, which no step trained",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.inference.generate:decode_answer",
        "answers",
        (
            "final-text-of-a-header-alone",
            'prefilled="final" if _is_prefilled(chat) else None',
            "prefilled=None",
            "answers are empty under `content`",
        ),
        (
            "spelled-tokens-dropped",
            "return chat.control.reveal(final, hidden).strip()",
            "return final.strip()",
            "answers that spell a control token hold other letters",
        ),
    ),
]
