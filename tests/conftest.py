"""The environment of every test, the oracle data beside the checkout where it exists, and the account of `make golden`."""

import os
import sys

# Before torch is imported, and for subprocesses and the workers of xdist too: tiny operations on many threads crawl, and
# no test may wait for a network. Set and not only suggested, so that a shell's own values do not decide what a test sees.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.update(ENVIRONMENT)

from collections.abc import Iterator  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from support import golden  # noqa: E402

if TYPE_CHECKING:
    from d2l.inference.load import TrainedModel

SHARED = Path(__file__).resolve().parents[2] / "shared"
torch.set_num_threads(1)  # where a plugin imported torch first


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """Return the folder of oracle data. Without it a test is skipped and says so; `pytest -m golden` fails."""
    if not SHARED.is_dir():
        absent = f"needs the oracle data in {os.path.relpath(SHARED)}"
        pytest.fail(absent, pytrace=False) if _golden_only(request.config) else pytest.skip(absent)
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _every_report_follows_its_schema() -> Iterator[None]:
    """Let every report and selftest that a test makes follow the published schema, and hold no key beside it."""
    if (
        find_spec("jsonschema") is None
    ):  # a rented machine without it runs the tests of its GPU; test_formats fails there
        yield
        return
    from support.report_schema import validated  # here: workers that collect need no report

    from checks.result import Report
    from checks.selftest import Selftest

    with pytest.MonkeyPatch.context() as patch:
        for kind in (Report, Selftest):
            patch.setattr(kind, "to_json", _then(kind.to_json, validated))
        yield


@pytest.fixture(autouse=True, scope="session")
def _workers_fork_no_others() -> Iterator[None]:
    """Let a worker of xdist run checks by itself: together the workers have every core already.

    Forked processes would each compute anew what this one computes once and keeps.
    """
    from checks import runner, selftest  # here: workers that collect need no checks

    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            for module in (runner, selftest):
                patch.setattr(module, "available_cores", lambda: 1)
        yield


def _then(method: Any, look: Any) -> Any:
    return lambda self, *arguments, **named: look(method(self, *arguments, **named))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one step on the tiny GPT-OSS."""
    from support.tiny_run import make_run  # here: few tests need a run

    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def trained(run_folder: Path) -> "TrainedModel":
    """Return the model of that run."""
    from d2l.inference.load import load_model

    return load_model(run_folder)


@pytest.fixture(autouse=True, scope="session")
def _skeletons_are_kept() -> Iterator[None]:
    """Build the skeleton of a base, whose names a plan of loading reads, once for each configuration of a base."""
    load_plan: Any = sys.modules.get("d2l.base.load_plan")
    if load_plan is None:  # no test that was collected loads a base
        yield
        return
    kept: dict[str, Any] = {}

    def once(base_config: Any) -> Any:
        text = base_config.to_json_string(use_diff=False)
        if text not in kept:
            kept[text] = build(base_config)
        return kept[text]

    build = load_plan.skeleton
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_plan, "skeleton", once)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the figures that are saved."""
    from matplotlib.figure import Figure  # here: few tests draw

    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **named: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def _golden_only(config: pytest.Config) -> bool:
    return config.option.markexpr == "golden"


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Iterator[None]:
    """Fail a test that loads a golden file and compares nothing of it."""
    golden.ACCOUNT.open.clear()
    result = yield
    golden.ACCOUNT.close()
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's account over, and fail `make golden` where a file of the folder was compared by no test."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["golden"] = dict(golden.ACCOUNT.compared)
    elif _unread(session.config) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add a worker's account."""
    golden.ACCOUNT.compared.update(getattr(node, "workeroutput", {}).get("golden", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """After `make golden`, how many values of the reference were compared."""
    if _golden_only(terminalreporter.config):
        terminalreporter.write_line(golden.ACCOUNT.summary())
        if unread := _unread(terminalreporter.config):
            terminalreporter.write_line(f"golden: FAILED, compared by no test: {', '.join(unread)}")


def _unread(config: pytest.Config) -> list[str]:
    """Golden files that a run of all golden tests has not compared; a run of some of them owes nothing."""
    every_test = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return golden.ACCOUNT.unread(SHARED) if _golden_only(config) and every_test else []
