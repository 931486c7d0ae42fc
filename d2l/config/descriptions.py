"""What each configuration key means: a sentence with its unit and default, when it has an effect, the reference's name.

Groups and keys stand in the order of `RunConfig`; types, defaults and ranges are those of its fields.
"""

from dataclasses import dataclass

from d2l.config.schema import LOSSES

ALWAYS = "always"
SAME_NAME = "the same"
ABSENT = "not in the reference"

_NEEDLES = "with `train_ds_names: [needle]`"
_EVALUATED = "with `eval_steps`"
_SINGLE_STAGE = f"{_NEEDLES} and no `curriculum`"


@dataclass(frozen=True)
class Description:
    """The prose facts of one key.

    Args:
        text: one sentence that reads without the key's name, without a full stop.
        effect: when the value changes anything.
        reference: what the reference implementation calls it.
    """

    text: str
    effect: str = ALWAYS
    reference: str = SAME_NAME


def _own(text: str, effect: str = ALWAYS) -> Description:
    """Describe a key that the reference does not have."""
    return Description(text, effect, ABSENT)


GROUPS: dict[str, dict[str, Description]] = {
    "Base model and tokenizer": {
        "model_name_or_path": Description(
            "Base model: a hub id, a local folder, or a config file for a random model; default: the embedded tiny GPT-OSS"
        ),
        "tokenizer_name_or_path": _own("Tokenizer: a hub id or a local folder; default: the base model's own"),
        "chat_template": _own(
            "Jinja file that writes conversations; default: the shipped training template, else the tokenizer's own"
        ),
        "current_date": _own("Date that templates print, as 'YYYY-MM-DD' in quotes; default: '2025-08-05'"),
        "supervision": _own(
            "Tokens of an answer that carry labels: its text and end token (`content`), or everything that the model "
            "has to sample, channel headers included (`sampled`)"
        ),
        "control_tokens": _own(
            "What the letters of a control token (`<|end|>`) in documents, prompts and responses are: plain text (`text`), "
            "an error (`refuse`), or the control token (`keep`)"
        ),
        "attn_implementation": Description(
            "Attention implementation of transformers, or `per_document`: the model's own on one packed document at a "
            "time, or `packed_flex`: compiled for CUDA, in memory linear in the length; `auto`: sdpa, and for models with "
            "sinks or without SDPA packed_flex on CUDA, else eager",
            reference="`use_flash_attn`",
        ),
        "dtype": Description(
            "Floating-point type of the base; `auto`: bfloat16 on CUDA devices that compute in it, else float32. Beside "
            "bfloat16, answers multiply the LoRA in float32 and training in bfloat16",
            reference="`bf16`",
        ),
        "expert_weights": _own(
            "Form of MXFP4 experts in memory: packed as in the checkpoint, dequantized, or the kernels of transformers "
            "(`native`), which cannot train; `auto`: packed",
            "with a base whose checkpoint is MXFP4",
        ),
        "expert_transient_gib": _own(
            "Most memory, in GiB, that dequantized weights of packed experts take at a time, where all experts of a layer "
            "are computed at once; less means more and smaller products",
            "with packed experts in bfloat16 on CUDA SM 90 and 100",
        ),
        "device_memory": _own(
            "Memory of the GPU that the run is planned for, in bytes or such as '80GiB'; default: that of the GPU here",
            "in `d2l plan` and MEM401; the run itself takes what it needs",
        ),
    },
    "Context encoder": {
        "ctx_encoder_type": Description(
            "Features of a document: its embeddings, the inputs of every layer, the input of one layer, or those of all "
            "layers side by side (`concat_layers`, which the reference does not have)"
        ),
        "layer_idx": Description(
            "Layer whose input gives the features, counted from 0; default: a quarter of the base's layers",
            "with `ctx_encoder_type: early_exit`; refused with another type",
        ),
        "quantize_ctx_encoder": Description(
            "Whether the encoder is quantized by bitsandbytes; the encoder is the base itself, so only false works",
            "`true` is refused when the base is loaded",
        ),
    },
    "Hypernetwork": {
        "lora_r": Description("Rank of the LoRA that one chunk of a document becomes"),
        "target_modules": Description(
            "Linears of every layer that get a LoRA, or `mlp` for an adapter beside the whole block; sorted by name"
        ),
        "latent_size": Description("Width of the Perceiver's latents, in features"),
        "n_latent_queries": Description("Number of latents that the Perceiver reads a chunk into"),
        "perceiver_heads": _own("Query heads of the Perceiver's attention; four share a key head"),
        "perceiver_head_dim": _own("Width of a head of the Perceiver's attention, in features"),
        "perceiver_query_scale": _own(
            "Factor on the Perceiver's initial query weights; 1 as published, at 10 latents read different tokens from "
            "the first step on"
        ),
        "num_blocks": Description("Blocks of the Perceiver's encoder, each with one cross-attention layer"),
        "num_self_attn_per_block": Description("Self-attention layers in each block of the Perceiver"),
        "shared_weights": Description(
            "Whether the Perceiver's blocks share their layers, apart from the first cross-attention"
        ),
        "num_pre_head_layers": Description("Residual MLP layers before the head that writes the LoRA"),
        "per_rank_gen": Description(
            "Whether the Perceiver makes one latent for every rank; without, no LoRA can be made",
            "`false` is refused when the model is built",
        ),
        "per_layer_processing": Description(
            "Whether the residual MLP layers before the head have weights of their own for every layer of the base"
        ),
        "use_bias": Description("Whether one learned LoRA that no document changes is added to every document's"),
    },
    "Data": {
        "train_ds_names": Description(
            "Data files (JSONL, JSON, also .gz, or Parquet), globs of them, dataset folders, or `needle` for generated "
            "documents; default: no data"
        ),
        "max_train_samples_per_ds": Description(
            "Documents that are read of each entry of train_ds_names; default: all",
            "not with a `curriculum`, which refuses it",
        ),
        "needle_documents": _own("Documents that are generated, for each stage", _NEEDLES),
        "needle_pairs": _own("Keys with values in a generated document", _SINGLE_STAGE),
        "needle_digits": _own("Decimal digits of a generated value", _SINGLE_STAGE),
        "needle_style": _own(
            "Wording of generated documents: English sentences, or pairs of words for tiny models", _NEEDLES
        ),
        "needle_filler_words": _own("Words of filler text in a generated document", _SINGLE_STAGE),
        "curriculum": _own(
            "Stages of generated documents, each with keys of its own, in place of needle_pairs, needle_digits and "
            "needle_filler_words; default: one stage",
            _NEEDLES,
        ),
        "max_ctx_len": Description("Longest document, in tokens; longer ones are left out and reported; -1: no limit"),
        "max_qas_len": Description(
            "Most tokens of questions with answers in one row of a document, whose further ones go to further rows; "
            "-1: no limit"
        ),
        "max_qas_per_sample": Description(
            "Most questions in one row of a document, whose further ones go to further rows; -1: no limit"
        ),
        "max_ctx_chunk_len": Description(
            "Longest chunk, in tokens with the template's around it; longer documents are cut as `chunking` says; "
            "-1: one chunk"
        ),
        "min_ctx_chunk_len": Description(
            "Shortest chunk that a drawn number of chunks may give, in tokens; a number that would give a shorter one is "
            "not drawn for that document; -1: no limit",
            "with `num_chunk_probs`",
        ),
        "max_ctx_chunk_num": Description(
            "Most chunks of a document; documents that need more are left out and reported; default: no limit"
        ),
        "num_chunk_probs": Description(
            "Probability of each number of chunks in training, summing to 1, such as {1: 0.5, 2: 0.5}; of those that the "
            "limits allow for a document, else the nearest that they do; default: as few as fit",
            "with `max_ctx_chunk_len`, which it needs",
        ),
        "chunking": _own(
            "Where documents are cut into chunks: into equal ones, as the reference cuts (n chunks of ⌈length / n⌉ tokens, "
            "the last of what is left; `equal`), or where sentences end, as equal as these allow (`sentences`). There, "
            "whole sentences are worth more chunks, up to `max_ctx_chunk_num` and `max_packed_ctx_len`; one that is longer "
            "than a chunk, and those of a document that was drawn more chunks than it has sentences, are cut between "
            "words, else between tokens",
            "where a document becomes several chunks",
        ),
        "chunk_overlap": _own(
            "Tokens at the end of a chunk that the next one begins with again, within `max_ctx_chunk_len`; with "
            "`chunking: sentences` at most as many: whole sentences where one fits, else whole words; 0: none",
            "where a document becomes several chunks",
        ),
        "max_packed_inp_len": Description("Most tokens of questions with answers in a packed row (a micro-batch)"),
        "max_packed_ctx_len": Description("Most tokens of documents in a packed row (a micro-batch)"),
        "cache": _own("Whether token rows of 1,000 and more records are kept on disk for the next run"),
        "cache_dir": _own(
            "Folder of the kept token rows; default: d2l in the user's cache folder", "with `cache: true`"
        ),
    },
    "Loss": {
        "loss": Description(
            f"Loss of a label token: {', or '.join(f'{meaning} (`{name}`)' for name, meaning in LOSSES.items())}",
            reference="`use_kl_loss`: false for ce, true for kl",
        ),
        "use_per_ctx_average_loss": Description(
            "Whether the loss is averaged over tokens, then questions, then documents; otherwise over all tokens"
        ),
        "gen_lora_l1_reg_coef": Description("Weight of the generated LoRAs' L1 norm in the loss; 0: none"),
    },
    "Optimization": {
        "learning_rate": Description("Highest learning rate of AdamW, per optimizer step"),
        "muon_learning_rate": _own(
            "Highest learning rate of Muon, which then steps all weight matrices; default: AdamW steps everything"
        ),
        "weight_decay": Description("Decoupled weight decay of weight matrices, times the learning rate per step"),
        "adam_beta1": Description("Decay rate of AdamW's mean of gradients"),
        "adam_beta2": Description("Decay rate of AdamW's mean of squared gradients"),
        "adam_epsilon": Description("Term in the denominator of AdamW's step"),
        "max_grad_norm": Description("Norm that larger gradients are clipped to"),
        "lr_scheduler_type": Description("Schedule of the learning rate over max_steps, by its name in transformers"),
        "min_lr": Description(
            "Learning rate at the end of the schedule",
            "with `lr_scheduler_type: cosine_with_min_lr`",
            "`lr_scheduler_kwargs: {min_lr: ...}`",
        ),
        "warmup_steps": Description("Optimizer steps in which the learning rate rises from 0"),
        "decay_steps": Description(
            "Last optimizer steps, in which the learning rate falls",
            "with `lr_scheduler_type: warmup_stable_decay`",
            "`lr_scheduler_kwargs: {num_decay_steps: ...}`",
        ),
        "max_steps": Description(
            "Length of the run, in optimizer steps; -1, Hugging Face's value for no limit, counts as not set"
        ),
        "gradient_accumulation_steps": Description("Packed rows (micro-batches) per optimizer step and process"),
        "gradient_checkpointing": Description("Whether layers of the base are computed again in the backward pass"),
        "gradient_checkpointing_kwargs": Description(
            "Arguments of torch's checkpoint function", "with `gradient_checkpointing: true`"
        ),
        "seed": Description("Seed of initial weights, generated documents, drawn chunks and the order of rows"),
    },
    "Evaluation": {
        "eval_steps": Description(
            "Optimizer steps between two evaluations on held-out documents, which change nothing of the run; evaluation.jsonl "
            "has them; default: none"
        ),
        "eval_documents": _own(
            "Documents that are held out: generated ones where train_ds_names has `needle`, else the first ones of "
            "val_ds_names, else some that training leaves out, a tenth of all at most",
            _EVALUATED,
        ),
        "val_ds_names": Description(
            "Data files as in train_ds_names, whose documents are held out; none of them may be in train_ds_names; default: "
            "some documents are kept out of training",
            f"{_EVALUATED} and without `needle` in train_ds_names",
        ),
    },
    "Output": {
        "output_dir": Description("Folder of the run; a used one gets a number behind it"),
        "save_steps": Description("Optimizer steps between checkpoints; the last step is always saved"),
        "save_total_limit": Description("Newest checkpoints that are kept"),
        "grace_seconds": _own(
            "Seconds between the signal that asks a run to stop and the one that kills it; default: those of torchelastic",
            "in a preflight: saving must not take longer",
        ),
        "report_to": Description(
            "Trackers that get the metrics too, through accelerate; `none` is none; a tracker that fails is left out with "
            "a warning, and training goes on"
        ),
        "logging_steps": Description(
            "Optimizer steps between two lines of output in a pipe, and between two reports to trackers; metrics.jsonl "
            "has every step"
        ),
    },
    "Preflight": {
        "select_checks": Description(
            "Checks that `d2l preflight` runs, by code, name or beginning of codes (`ATT`), where --select names none; "
            "`d2l train` runs all; default: all"
        ),
        "ignore_checks": Description(
            "Check, or beginning of codes → why its finding is acceptable, as --ignore has it; `REASON@2027-01-31` until that "
            "day; it stays visible"
        ),
    },
}

STAGE: dict[str, Description] = {
    "pairs": _own("Keys with values in a document"),
    "digits": _own("Decimal digits of a value"),
    "filler_words": _own("Words of filler text in a document, or the most where min_filler_words is set"),
    "min_filler_words": _own("Fewest words of filler text, of which each document draws its own; default: all alike"),
    "passing": _own("Moving average of the share of exactly answered questions that ends the stage"),
    "documents": _own("Documents that are generated for the stage; default: needle_documents"),
}
