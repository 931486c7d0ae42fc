"""Mutants of the hypernetwork: sizes, Perceiver, heads, encoder and targets."""

from experiments.mutants.mutant import bugs

_AREA = "hypernetwork"

MUTANTS = [
    *bugs(
        _AREA,
        "d2l.build:build_model",
        "lora",
        (
            "weights-of-another-seed",
            "manual_seed(config.seed)",
            "manual_seed(0)",
            "runs of several seeds start from the same weights",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.shape:HypernetShape.scale",
        "lora",
        (
            "scale-divided-by-rank",
            "2 * self.config.lora_r**1.5",
            "2 * self.config.lora_r**0.5",
            "the delta is r times too weak, as PEFT would divide",
        ),
        (
            "scale-of-rank-one",
            "2 * self.config.lora_r**1.5",
            "2.0",
            "the scale no longer grows with the rank",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.shape:HypernetShape.names",
        "lora",
        (
            "modules-in-reverse-order",
            "sorted(self.modules)",
            "sorted(self.modules, reverse=True)",
            "checkpoints of the reference give one module the other's LoRA",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.hypernetwork:Hypernetwork.__init__",
        "lora",
        (
            "scaler-a-starts-at-zero",
            "torch.ones(scaler)",
            "torch.zeros(scaler)",
            "A and B both start at zero, so no gradient reaches the heads",
        ),
        (
            "lora-starts-off-zero",
            "name: torch.zeros(scaler)",
            "name: torch.ones(scaler)",
            "the base is disturbed at random from the first step",
        ),
        (
            "bias-b-starts-at-one",
            "torch.zeros(*rows, shape.modules[name][1])",
            "torch.ones(*rows, shape.modules[name][1])",
            "the shared LoRA starts large and in one direction",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.hypernetwork:_bias_rows",
        "lora",
        (
            "bias-init-too-wide",
            "(d_in * rank) ** 0.5",
            "(d_in * rank) ** 0.25",
            "the shared A starts ten times too large",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.hypernetwork:_head",
        "lora",
        ("head-init-too-wide", "std=0.5 /", "std=5.0 /", "generated rows start ten times too large"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.hypernetwork:Hypernetwork.lora",
        "lora",
        (
            "a-and-b-swapped",
            "a, b, _ = rows[:, :, module].split([d_in, d_out,",
            "b, a, _ = rows[:, :, module].split([d_out, d_in,",
            "a checkpoint of the reference gives other adapters",
        ),
        (
            "latents-not-normalized",
            "F.normalize(latents, dim=-1, eps=ZERO_LATENT)",
            "latents",
            "the size of the LoRA depends on the size of latents",
        ),
        (
            "latents-normalized-over-ranks",
            "F.normalize(latents, dim=-1,",
            "F.normalize(latents, dim=-2,",
            "ranks compete for one norm",
        ),
        (
            "scaler-b-unused",
            "b * self.scaler_B[name]",
            "b * self.scaler_A[name]",
            "B starts off zero and scaler_B never learns",
        ),
        (
            "scaler-a-unused",
            "a * self.scaler_A[name]",
            "a",
            "scaler_A never learns",
        ),
        (
            "first-pre-head-layer-skipped",
            "for layer in self.layers:",
            "for layer in self.layers[1:]:",
            "a residual MLP is never run",
        ),
        (
            "first-module-for-all",
            "rows[:, :, module]",
            "rows[:, :, 0]",
            "every module gets the rows of the first",
        ),
        (
            "layers-reversed",
            "eps=ZERO_LATENT))",
            "eps=ZERO_LATENT)).flip(1)",
            "the first layer's features make the last layer's LoRA",
        ),
        (
            "first-layer-detached",
            "F.normalize(latents, dim=-1",
            "F.normalize(torch.cat([latents[:, :1].detach(), latents[:, 1:]], dim=1), dim=-1",
            "the aggregator never learns from the first layer",
        ),
        (
            "last-module-detached",
            "F.normalize(latents, dim=-1",
            "F.normalize(torch.cat([latents[:, :, :-1], latents[:, :, -1:].detach()], dim=2), dim=-1",
            "the aggregator never learns from the last module",
        ),
        (
            "last-rank-detached",
            "F.normalize(latents, dim=-1",
            "F.normalize(torch.cat([latents[..., :-1, :], latents[..., -1:, :].detach()], dim=3), dim=-1",
            "the aggregator never learns from the last rank",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.hypernetwork:Hypernetwork.bias",
        "lora",
        (
            "bias-a-detached",
            "self.bias_A[name][None]",
            "self.bias_A[name].detach()[None]",
            "half of the shared LoRA never learns",
        ),
        (
            "bias-b-negated",
            "self.bias_B[name][None]",
            "-self.bias_B[name][None]",
            "a checkpoint of the reference gives other adapters",
        ),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.hypernetwork:PerLayerResidual.forward",
        "lora",
        ("per-layer-residual-lost", "latents + self.layers(latents)", "self.layers(latents)", "no skip connection"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.hypernetwork:SharedResidual.forward",
        "lora",
        ("shared-residual-lost", "latents + self.mlp(latents)", "self.mlp(latents)", "no skip connection"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.hypernetwork:_residual_branch",
        "lora",
        ("silu-replaced-by-relu", "nn.SiLU()", "nn.ReLU()", "imported weights compute something else"),
    ),
    *bugs(
        _AREA,
        "d2l.hypernet.targets:find_targets",
        "lora",
        (
            "every-layer-targets-the-first",
            "targets[name] = [module for (module,) in found]",
            "targets[name] = [found[0][0] for _ in found]",
            "one layer is adapted by all LoRAs, the others by none",
        ),
        (
            "targets-in-reverse-order",
            "targets[name] = [module for (module,) in found]",
            "targets[name] = [module for (module,) in found][::-1]",
            "each layer gets the LoRA of the one opposite",
        ),
    ),
]
