"""Checkpoints of the reference: the numbers come over, and no file gets to run, import or write anything."""

import io
import os
import pickle
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import golden
from support.families import BASES
from support.golden import assert_close, load_case
from test_end_to_end import batch_of, build

from checks.reference_file import Call, Global, Instance, reference_state, write_reference_file
from d2l.checkpoint import load_checkpoint, load_hypernet
from d2l.config.schema import RunConfig
from d2l.errors import CheckpointError
from d2l.hypernet.hypernetwork import Hypernetwork
from d2l.hypernet.shape import HypernetShape
from d2l.reference import inert_pickle
from d2l.reference.inert_pickle import OrderedMapping, SavedDataclass, TorchFile
from d2l.reference.load import import_reference

BASE = BASES["llama"].tiny(hidden_size=16, num_hidden_layers=3)  # no Linear is square
SIZES = {"q_proj": (16, 32), "down_proj": (24, 16)}


def run_config(**values: Any) -> RunConfig:
    small = {"lora_r": 2, "latent_size": 6, "n_latent_queries": 4, "num_blocks": 1, "model_name_or_path": "some/base"}
    return RunConfig(**{**small, "target_modules": ("q_proj", "down_proj"), **values})


def hypernet_of(config: RunConfig) -> Hypernetwork:
    torch.manual_seed(0)
    modules = {name: SIZES[name] for name in config.target_modules}
    return Hypernetwork(HypernetShape(config=config, modules=modules, n_layers=3, feature_size=16))


def example(**values: Any) -> dict[str, Any]:
    """What the reference would save of a small hypernetwork."""
    config = run_config(**values)
    return reference_state(hypernet_of(config).state_dict(), config, BASE, SIZES)


def write(folder: Path, state: Any) -> Path:
    write_reference_file(folder / "pytorch_model.bin", state)
    return folder / "pytorch_model.bin"


def members_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


PICKLE = "pytorch_model/data.pkl"


# What comes over


@pytest.mark.golden
def test_the_golden_checkpoint(shared: Path, tmp_path: Path) -> None:
    case = load_case(shared, "checkpoint_llama")
    import_reference(shared / "golden" / "reference" / case.meta["file"], tmp_path / "imported")
    checkpoint = load_checkpoint(tmp_path / "imported")
    assert {name: list(value.shape) for name, value in checkpoint.hypernet.items()} == {
        name: shape for name, (_, shape) in case.meta["state_dict"].items()
    }
    for name, value in checkpoint.hypernet.items():
        assert float(value.double().sum()) == pytest.approx(case.meta["tensor_sums"][name], abs=1e-9), name
    config = RunConfig(**checkpoint.state["config"])
    assert config.model_name_or_path == "tiny-llama"
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in config if key in case.config} == {
        key: value for key, value in case.config.items() if key != "lora_alpha"
    } | {"layer_idx": None}
    model, batch = build(case), batch_of(case)
    load_hypernet(model.hypernet, checkpoint.hypernet)
    with torch.no_grad():
        lora = model.lora(batch)
        assert_close(lora.A["q_proj"], case["out.combined.q_proj.A"], golden.OUTPUTS, "A")
        assert_close(lora.B["q_proj"], case["out.combined.q_proj.B"], golden.OUTPUTS, "B")
        assert_close(model.logits(batch, lora)[None], case["out.logits"], golden.OUTPUTS, "logits")


@pytest.mark.parametrize(
    "values",
    [
        {"ctx_encoder_type": "early_exit", "layer_idx": 2, "num_blocks": 3, "num_self_attn_per_block": 1},
        {"ctx_encoder_type": "per_layer_activations", "target_modules": ("q_proj",), "use_bias": False},
        {"ctx_encoder_type": "embed_only", "shared_weights": True, "num_blocks": 2, "per_layer_processing": False},
        {"lora_r": 3, "num_pre_head_layers": 0, "layer_idx": 0},
    ],
)
def test_configuration_and_tensors_come_back(tmp_path: Path, values: dict[str, Any]) -> None:
    import_reference(write(tmp_path, example(**values)), tmp_path / "imported")
    checkpoint = load_checkpoint(tmp_path / "imported")
    assert RunConfig(**checkpoint.state["config"]) == run_config(**values)
    assert checkpoint.state["base"] == {"hidden_size": 16, "num_hidden_layers": 3}
    expected = hypernet_of(run_config(**values)).state_dict()
    assert checkpoint.hypernet.keys() == expected.keys()
    assert all(torch.equal(checkpoint.hypernet[name], value) for name, value in expected.items())


def test_files_of_torch_save_are_read(tmp_path: Path) -> None:
    """Views, shared storages, scalars and empty tensors, in every number format."""
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": whole, "part": whole[1:, ::2], "turned": whole.T, "scalar": torch.tensor(2.5)}
    tensors |= {
        "empty": torch.empty(0, 3),
        "integers": torch.arange(3),
        "half": whole.half(),
        "brain": whole.bfloat16(),
    }
    state = torch.nn.Module().state_dict()  # an OrderedDict with torch's metadata on it
    state.update(tensors)
    torch.save(state, tmp_path / "file.bin")
    with TorchFile(tmp_path / "file.bin", ()) as file:
        assert isinstance(file.root, OrderedMapping)
        for name, value in tensors.items():
            read = file.read_tensor(file.root[name])
            assert read.dtype == value.dtype
            assert torch.equal(read, value), name


def test_files_written_for_these_tests_are_read_by_torch(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(2, 3).T.bfloat16(), "n": torch.arange(3)}
    values = {"x": [1, -2.5, "é", None, True, (1,), {"q_proj"}, {"k": 2}]}
    loaded = torch.load(write(tmp_path, {**tensors, **values}), weights_only=False)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    assert loaded["x"] == values["x"]


# What is refused, by name


def with_field(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Change one field, such as `hypernet_config.lora_config.r`, or a tensor; `...` removes it."""

    def change(state: dict[str, Any]) -> None:
        *outer, last = path.split(".") if path.startswith(("hypernet_config", "ctx_encoder_args")) else [path]
        fields: Any = state
        for name in outer:
            fields = fields[name].fields if isinstance(fields[name], Instance) else fields[name]
        if value is ...:
            del fields[last]
        else:
            fields[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("hypernet_config.lora_config.lora_alpha", 16.0, r"lora_alpha: expected 5\.65685\d*, found 16\.0"),
        ("hypernet_config.lora_config.lora_dropout", 0.1, r"lora_dropout: expected 0\.0, found 0\.1"),
        ("hypernet_config.lora_config.r", "many", "lora_r: .*found 'many'"),
        ("hypernet_config.lora_config.r", 3, r"lora_alpha: expected 10\.39"),
        ("hypernet_config.lora_config.target_modules", {"q_proj"}, "feature_sizes.*expected sizes of q_proj"),
        ("hypernet_config.use_light_weight_lora", True, "use_light_weight_lora: expected False, found True"),
        ("hypernet_config.dropout_rate", 0.5, "dropout_rate"),
        ("hypernet_config.extra_modules", ["layernorm"], r"extra_modules: expected None or \[\], found \['layernorm'\]"),
        ("hypernet_config.moe_lora_strategy", "shared", "hypernet_config.moe_lora_strategy: expected None .*'shared'"),
        ("hypernet_config.latent_size", ..., "no hypernet_config.latent_size"),
        ("hypernet_config.lora_config.lora_alpha", ..., "no lora_config.lora_alpha"),
        ("hypernet_config.latent_size", 7, "output_size: expected 7, found 6"),
        ("hypernet_config.layer_indices", torch.arange(2), "num_layers: expected 2, found 3"),
        ("hypernet_config.layer_indices", torch.tensor([0, 2, 1]), "layer_indices: expected every layer in order"),
        ("hypernet_config.layer_indices", "all", "layer_indices"),
        ("hypernet_config.feature_sizes", ({"q_proj": 16},), "feature_sizes"),
        ("hypernet_config.base_hidden_size", -1, "base_hidden_size"),
        ("hypernet_config.aggregator_config.aggregator_type", "pooler", "aggregator_type: expected 'perceiver'"),
        ("hypernet_config.aggregator_config.num_extra_modules", 1, "num_extra_modules: expected 0, found 1"),
        ("hypernet_config.aggregator_config.num_blocks", 10**6, "more layers than it has tensors"),
        ("hypernet_config.aggregator_config.num_blocks", 2, "is of another model than its arguments describe"),
        ("hypernet_config.aggregator_config", "perceiver", "no aggregator_config"),
        ("ctx_encoder_args.ctx_encoder_type", "middle", "ctx_encoder_type: Input should be"),
        ("ctx_encoder_args.ctx_encoder_model_name_or_path", "other/model", "expected None or 'some/base', found 'other/model'"),
        ("ctx_encoder_args.ctx_encoder_last_layer", 2, "ctx_encoder_last_layer: expected None or 3, found 2"),
        ("ctx_encoder_args.quantize_ctx_encoder", 4, "quantize_ctx_encoder: expected False or True, found 4"),
        ("base_model_name_or_path", None, "model_name_or_path"),
        ("hypernet_config", ..., "no hypernet_config in it"),
        ("ctx_encoder_args", 3, "no ctx_encoder_args in it"),
        ("head.weight", ..., r"(?s)1 parameters missing.*head\.weight: expected \[3, 2, 6, 48\], found none"),
        ("surplus", torch.ones(2), "1 left over"),
        ("bias_A.q_proj", torch.full((3, 2, 16), torch.inf), "bias_A.q_proj holds values that are not finite"),
    ],
)  # fmt: skip
def test_unsupported_values_are_named(tmp_path: Path, path: str, value: Any, expected: str) -> None:
    state = example(use_bias=True)
    change = with_field(path, value)
    change(state)
    with pytest.raises(CheckpointError, match=expected) as caught:
        import_reference(write(tmp_path, state), tmp_path / "imported")
    assert len(str(caught.value)) < 1500
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ctx_encoder_args.ctx_encoder_model_name_or_path", "some/base"),
        ("ctx_encoder_args.ctx_encoder_last_layer", 3),
        ("hypernet_config.light_weight_latent_size", 128),
        ("hypernet_config.lora_config.use_dora", True),
        ("hypernet_config.some_later_switch", False),
        ("hypernet_config.aggregator_config.pooling_type", "mean"),
        ("hypernet_config.lora_config.lora_alpha", 2 * 2**1.5 * (1 + 1e-12)),
        ("hypernet_config.layer_indices", [0, 1, 2]),
    ],
)
def test_values_without_effect_pass(tmp_path: Path, path: str, value: Any) -> None:
    state = example()
    with_field(path, value)(state)
    import_reference(write(tmp_path, state), tmp_path / "imported")
    assert (tmp_path / "imported" / "manifest.json").is_file()


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "imported").mkdir()
    with pytest.raises(CheckpointError, match="never written over"):
        import_reference(write(tmp_path, example()), tmp_path / "imported")


# Files that want to do something


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists only if a pickle got its way: by `os.system`, or by writing to a class of inert_pickle."""
    proof = tmp_path / "proof"
    monkeypatch.setattr(os, "system", lambda command: proof.write_text(command))
    return proof


def refuse(tmp_path: Path, pickled: bytes, storages: tuple[bytes, ...] = ()) -> str:
    """Import an archive with this pickle and expect it to be refused; returns the message."""
    members = {f"pytorch_model/data/{key}": data for key, data in enumerate(storages)}
    path = write_archive(tmp_path / "pytorch_model.bin", {PICKLE: pickled, **members})
    before = {name: dict(vars(value)) for name, value in vars(inert_pickle).items() if isinstance(value, type)}
    with pytest.raises(CheckpointError) as caught:
        import_reference(path, tmp_path / "imported")
    assert before == {name: dict(vars(value)) for name, value in vars(inert_pickle).items() if isinstance(value, type)}
    assert not (tmp_path / "imported").exists()
    return str(caught.value)


class Evil:
    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.mark.parametrize(
    ("name", "pickled"),
    [
        ("posix.system|nt.system|os.system", pickle.dumps(Evil(os.system, ("touch proof",)), protocol=2)),
        ("os.system", b"\x80\x02cos\nsystem\nX\x05\x00\x00\x00touch\x85R."),
        ("__builtin__.eval", b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R."),
        ("builtins.getattr", b"\x80\x02cbuiltins\ngetattr\n."),
        ("__builtin__.getattr", b"\x80\x02c__builtin__\ngetattr\n."),
        ("collections.OrderedDict.__class__", b"\x80\x02ccollections\nOrderedDict.__class__\n."),
        ("torch._utils._rebuild_tensor_v2.__globals__", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n."),
        ("torch.load", b"\x80\x02ctorch\nload\n."),
        ("d2l.reference.inert_pickle.os", b"\x80\x02cd2l.reference.inert_pickle\nos\n."),
        ("ctx_to_lora.modeling.hypernet.HyperLoRA", b"\x80\x02cctx_to_lora.modeling.hypernet\nHyperLoRA\n."),
        ("functools.partial", b"\x80\x02cfunctools\npartial\n."),
    ],
)
def test_a_name_that_is_not_listed_is_refused_by_name(tmp_path: Path, witness: Path, name: str, pickled: bytes) -> None:
    message = refuse(tmp_path, pickled)
    assert any(f"asks for {one}," in message for one in name.split("|")), message
    assert "nothing was run" in message
    assert not witness.exists()


def test_it_is_refused_at_any_place(tmp_path: Path, witness: Path) -> None:
    places: dict[str, Any] = {
        "a tensor's name": {Call("os.system", ("x",)): 1},
        "a field": {"ctx_encoder_args": Instance("ctx_to_lora.configs.CtxEncoderArguments", {"x": Call("os.system", ("x",))})},
        "a storage": {"w": Call("torch._utils._rebuild_tensor_v2", (Call("os.system", ("x",)), 0, (1,), (1,), False, None))},
        "an argument": {"w": Call("peft.utils.peft_types.PeftType", (Call("os.system", ("x",)),))},
        "unused": {"w": (Global("os.system"), 1)},
    }  # fmt: skip
    for place, state in places.items():
        with pytest.raises(CheckpointError, match=r"asks for os\.system,"):
            import_reference(write(tmp_path, {**example(), **state}), tmp_path / "imported")
        assert not witness.exists(), place


ORDERED, REBUILD, PEFT_TYPE, RECORD, SET, STORAGE = (
    f"c{name}\n".encode()
    for name in (
        *("collections\nOrderedDict", "torch._utils\n_rebuild_tensor_v2", "peft.utils.peft_types\nPeftType"),
        *("ctx_to_lora.configs\nCtxEncoderArguments", "__builtin__\nset", "torch\nFloatStorage"),
    )
)
ITEM = b"X\x04\x00\x00\x00evilK\x01"  # the key 'evil' and the value 1
ONE_ITEM = b"}" + ITEM + b"s"
SLOTS = b"N" + ONE_ITEM + b"\x86"  # (None, {'evil': 1}): BUILD sets attributes


@pytest.mark.parametrize(
    "state", [ONE_ITEM, SLOTS, b"K\x01", b"K\x01K\x02\x86"], ids=["fields", "slots", "int", "pair"]
)
@pytest.mark.parametrize(
    "target",
    [
        *(ORDERED, REBUILD, PEFT_TYPE, RECORD, SET, STORAGE),  # a listed class itself
        *(
            SET + b"]\x85R",
            PEFT_TYPE + b"K\x01\x85R",
            REBUILD + b"(K\x01K\x01K\x01K\x01K\x01K\x01tR",
        ),  # an object of one
        b"(X\x07\x00\x00\x00storage" + STORAGE + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ",
        *(b"K\x01", b"X\x01\x00\x00\x00a", b"]", b"}", b"N"),  # plain values
    ],
)
def test_state_is_never_set_on_objects_without_state(
    tmp_path: Path, witness: Path, target: bytes, state: bytes
) -> None:
    assert "its pickle is malformed" in refuse(tmp_path, b"\x80\x02" + target + state + b"b.")


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + RECORD + b"K\x01\x85R.",  # a dataclass called with arguments
        b"\x80\x02" + RECORD + b")\x81K\x01b.",  # its state is a number
        b"\x80\x02X\x01\x00\x00\x00a)R.",  # a string is called
        b"\x80\x02" + STORAGE + b")R.",
        b"\x80\x02" + REBUILD + b")R.",
        b"\x80\x02" + ORDERED + b")R" + SET + b"]\x85Rb" + b"\x85R.",
        b"\x80\x02K\x01Q.",  # a storage that is a number
        b"\x80\x02X\x01\x00\x00\x00aQ.",
        b"\x80\x02r\xff\xff\xff\x7f.",  # memo place 2 ** 31 - 1
        b"\x80\x02Nr\x00\x00\x00\x70.",  # a memo that would fill gigabytes
        b"\x80\x02h\x05.",  # a memo place that was never filled
        b"\x80\x04\x95\x02\x00\x00\x00\x00\x00\x00\x00N.",  # protocol 4
        b"\x80\x02\x82\x01.",  # the extension registry
        b"(ios\nsystem\n.",  # the old way to make objects
        b"\x80\x02P1\n.",
        b"\x80\x02" + b"(" * 5000 + b".",
        b"\x80\x02N",  # no end
        b"",
        b"\x80\x02.",
        b"\x80\x02X\xff\xff\xff\xffabc.",  # a string of 4 GB
    ],
)
def test_malformed_pickles(tmp_path: Path, witness: Path, pickled: bytes) -> None:
    assert "its pickle is malformed" in refuse(tmp_path, pickled)
    assert not witness.exists()


@pytest.mark.parametrize(
    "path",
    [
        *("hypernet_config", "hypernet_config.latent_size", "hypernet_config.layer_indices", "hypernet_config.extra"),
        *(
            "hypernet_config.feature_sizes",
            "hypernet_config.base_hidden_size",
            "hypernet_config.lora_config.lora_alpha",
        ),
        *("hypernet_config.lora_config.target_modules", "ctx_encoder_args.ctx_encoder_type", "base_model_name_or_path"),
    ],
)
def test_nested_values_do_not_blow_up_a_message(tmp_path: Path, path: str) -> None:
    """Forty lists, each holding the one before it twice: a few hundred bytes that no repr must try to print."""
    bomb = b"](]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b"e"
    state = example()
    with_field(path, "BOMB")(state)
    file = write(tmp_path, state)
    members = members_of(file)
    write_archive(file, {**members, PICKLE: members[PICKLE].replace(b"X\x04\x00\x00\x00BOMB", bomb)})
    with pytest.raises(CheckpointError, match=path.rpartition(".")[2].removeprefix("base_")) as caught:
        import_reference(file, tmp_path / "imported")
    assert len(str(caught.value)) < 1500


# Tensors and archives


def one_tensor(*rest: Any, numel: int = 6, key: str = "0", kind: str = "torch.FloatStorage") -> bytes:
    """A pickle of {'w': tensor} with these further arguments of the rebuilder."""

    def integer(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + integer("storage") + f"c{kind.replace('.', chr(10), 1)}\n".encode() + integer(key) + integer("cpu")
    arguments = b"".join(integer(item) for item in rest)
    tensor = REBUILD + b"(" + storage + integer(numel) + b"tQ" + arguments + b"\x89" + ORDERED + b")RtR"
    return b"\x80\x02" + ORDERED + b")R" + integer("w") + tensor + b"s."


@pytest.mark.parametrize(
    ("rest", "numel", "expected"),
    [
        ((0, (2, 4), (4, 1)), 6, "a tensor of 8 values"),
        ((1, (2, 3), (3, 1)), 6, "reaches beyond"),
        ((0, (2, 2), (5, 1)), 6, "reaches beyond"),
        ((0, (10**9, 10**9), (0, 0)), 6, "reaches beyond"),
        ((7, (1,), (1,)), 6, "reaches beyond"),
        ((0, (2, 3), (3, 1)), 10**12, "1,000,000,000,000 announced"),
        ((0, (2, 3), (3, 1)), 5, "5 announced"),
        ((-1, (2,), (1,)), 6, "not one that torch writes"),
        ((0, (-2, -3), (3, 1)), 6, "not one that torch writes"),
        ((0, (2, 3), (-3, -1)), 6, "not one that torch writes"),
        ((0, (2, 3), (1,)), 6, "not one that torch writes"),
        ((0, [6], (1,)), 6, "not one that torch writes"),
        ((0, (True, 3), (3, 1)), 6, "not one that torch writes"),
        ((0.0, (6,), (1,)), 6, "not one that torch writes"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path, rest: Any, numel: int, expected: str) -> None:
    members = {"file/data.pkl": one_tensor(*rest, numel=numel), "file/data/0": bytes(24)}
    path = write_archive(tmp_path / "file.bin", members)
    with TorchFile(path, ()) as file, pytest.raises(CheckpointError, match=expected):
        file.read_tensor(file.root["w"])


def test_a_storage_costs_its_size_once_and_hundreds_of_names_are_refused(tmp_path: Path) -> None:
    shared = torch.arange(2**18, dtype=torch.float32)  # 1 MiB
    path = tmp_path / "file.bin"
    torch.save({f"w{number}": shared for number in range(400)}, path)
    taken: list[torch.Tensor] = []
    tracemalloc.start()
    with TorchFile(path, ()) as file, pytest.raises(CheckpointError, match="more than 32 times the file's") as caught:
        taken += (file.read_tensor(it) for it in file.root.values())  # what was read before stays
    assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    tracemalloc.stop()
    assert "tampered" in str(caught.value)


def test_a_storage_that_several_layers_share_is_read(tmp_path: Path) -> None:
    shared = torch.arange(6, dtype=torch.float32)
    path = tmp_path / "file.bin"
    torch.save({"a": shared[:3], "b": shared.view(2, 3), "c": shared[3:].view(3, 1)}, path)
    with TorchFile(path, ()) as file:
        read = {name: file.read_tensor(it) for name, it in file.root.items()}
    assert read["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (read["a"].tolist(), read["c"].tolist()) == ([0, 1, 2], [[3], [4], [5]])
    assert len({it.untyped_storage().data_ptr() for it in read.values()}) == 1


def test_storages_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """Two entries of the archive's directory that name the same bytes: a small file would unpack to any size."""
    path = tmp_path / "file.bin"
    torch.save({"a": torch.ones(4096), "b": torch.ones(4096)}, path)
    with TorchFile(path, ()) as file:
        first, second = (file._archive.getinfo(f"file/data/{key}") for key in "01")
        second.header_offset = first.header_offset
        second.orig_filename = first.orig_filename
        file._size = 30_000
        file.read_tensor(file.root["a"])
        with pytest.raises(CheckpointError, match=r"lie over each other|Overlapped|damaged"):
            file.read_tensor(file.root["b"])


def test_a_storage_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, example())
    write_archive(path, {name: data for name, data in members_of(path).items() if not name.endswith("data/3")})
    with pytest.raises(CheckpointError, match="data/3 is missing"):
        import_reference(path, tmp_path / "imported")


@pytest.mark.parametrize(
    ("pickled", "expected"),
    [
        (one_tensor(0, (6,), (1,), key="../0"), "its pickle is malformed"),
        (one_tensor(0, (6,), (1,), kind="torch.QInt8Storage"), r"asks for torch\.QInt8Storage"),
        (one_tensor(0, (6,), (1,)), "no hypernet_config"),
        (b"\x80\x02]q\x00.", "expected a state dict"),
        (b"\x80\x02" + ORDERED + b")RK\x01K\x02s.", "expected a state dict"),
    ],
)
def test_files_that_are_not_checkpoints(tmp_path: Path, pickled: bytes, expected: str) -> None:
    assert re.search(expected, refuse(tmp_path, pickled, (bytes(24),)))


@pytest.mark.parametrize(
    ("changes", "compression", "expected"),
    [
        ({}, zipfile.ZIP_DEFLATED, "is compressed"),
        ({"other/data.pkl": b"N."}, zipfile.ZIP_STORED, r"one data\.pkl, found 2"),
        ({"pytorch_model/byteorder": b"big"}, zipfile.ZIP_STORED, "'big' byte order"),
    ],
)
def test_archives_that_torch_does_not_write(
    tmp_path: Path, changes: dict[str, bytes], compression: int, expected: str
) -> None:
    path = write(tmp_path, example())
    write_archive(path, members_of(path) | changes, compression)
    with pytest.raises(CheckpointError, match=expected):
        import_reference(path, tmp_path / "imported")


def test_other_formats_are_named(tmp_path: Path) -> None:
    cases: dict[str, bytes] = {
        "a bare pickle": pickle.dumps({}),
        "expected an archive of torch.save": b"not a checkpoint at all",
        "expected an archive": b"",
    }
    torch.save({}, old := io.BytesIO(), _use_new_zipfile_serialization=False)
    cases["torch before 1.6. Only if you trust who made it"] = old.getvalue()
    for expected, data in cases.items():
        (tmp_path / "file.bin").write_bytes(data)
        with pytest.raises(CheckpointError, match=expected):
            import_reference(tmp_path / "file.bin", tmp_path / "imported")
    with pytest.raises(CheckpointError, match="No such file"):
        import_reference(tmp_path / "absent.bin", tmp_path / "imported")
    with pytest.raises(CheckpointError, match="is a folder"):
        import_reference(tmp_path, tmp_path / "imported")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("whole"), example(target_modules=("q_proj",))).read_bytes()


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused(tmp_path: Path, whole: bytes, share: float) -> None:
    (tmp_path / "file.bin").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"cut off or damaged|malformed|missing or damaged"):
        import_reference(tmp_path / "file.bin", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(changes=st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_pickle_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    """Any bytes changed in the pickle: a value comes out, or a CheckpointError; nothing else, and nothing runs."""
    folder = tmp_path_factory.mktemp("damaged")
    path = write(folder, {"w": torch.ones(3), **{k: v for k, v in example().items() if isinstance(v, Instance)}})
    members = members_of(path)
    pickled = bytearray(members[PICKLE])
    for place, value in changes:
        pickled[place % len(pickled)] = value
    write_archive(path, {**members, PICKLE: bytes(pickled)})
    try:
        import_reference(path, folder / "imported")
    except CheckpointError as error:
        assert str(path) in str(error) or "another model" in str(error)  # noqa: PT017


def test_dataclasses_hold_the_fields_of_the_file_and_no_more() -> None:
    assert dict(SavedDataclass.values) == {}
    with pytest.raises(TypeError):
        SavedDataclass.values["evil"] = 1  # type: ignore[index]
