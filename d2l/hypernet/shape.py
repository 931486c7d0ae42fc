"""What fixes the parameters of a hypernetwork: the run's configuration and the sizes of its base."""

from collections.abc import Mapping
from dataclasses import dataclass

from d2l.config.schema import RunConfig

QUERIES_PER_KEY = 4  # query heads of the Perceiver that share a key and a value head
MLP_RATIO = 4  # inner width of every MLP of the hypernetwork, as a multiple of its input's


@dataclass(frozen=True, kw_only=True)
class HypernetShape:
    """The configuration and the base's sizes; every module reads from here what it is built of.

    Attributes:
        config: of the run.
        modules: (d_in, d_out) of each of the config's target modules, the same in every layer.
        n_layers: decoder layers of the base.
        feature_size: of the context encoder's features, F.
    """

    config: RunConfig
    modules: Mapping[str, tuple[int, int]]
    n_layers: int
    feature_size: int

    def __post_init__(self) -> None:
        wanted, found = sorted(self.config.target_modules), sorted(self.modules)
        assert wanted == found, f"target_modules are {wanted}, but there are sizes of {found}"

    @property
    def names(self) -> tuple[str, ...]:
        """Target modules in the order of the latents' module axis."""
        return tuple(sorted(self.modules))

    @property
    def scale(self) -> float:
        """Factor of every LoRA delta, applied directly: 2·r^1.5 (not divided by the rank)."""
        return 2 * self.config.lora_r**1.5

    @property
    def row_size(self) -> int:
        """Values that the head makes per rank: a row of A and a row of B of the largest module."""
        return max(d_in + d_out for d_in, d_out in self.modules.values())

    @property
    def per_layer_features(self) -> bool:
        """Whether the context encoder gives features of every layer, or one set of features for all."""
        return self.config.ctx_encoder_type == "per_layer_activations"

    @property
    def feature_layers(self) -> int:
        """Sets of features: one for every layer, or one for all."""
        return self.n_layers if self.per_layer_features else 1

    @property
    def outputs(self) -> int:
        """Latents that a chunk is decoded to under one set of features."""
        ranks = self.config.lora_r if self.config.per_rank_gen else 1
        return len(self.modules) * ranks * (self.n_layers // self.feature_layers)
