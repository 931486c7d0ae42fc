"""Two hosts on one machine: network namespaces that a cable (a veth pair) joins, each with a name of its own. Needs root."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4


@dataclass(frozen=True)
class Host:
    """A host: its network namespace, network interface and address."""

    namespace: str
    interface: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command begins with that runs on this host."""
        inside = f'hostname {self.namespace} && export GLOO_SOCKET_IFNAME={self.interface} && exec "$@"'
        return ("ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", inside, "sh")

    def plug(self, state: str) -> None:
        """Set the cable's end `up` or `down`."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts that reach each other and nothing else.

    Raises:
        OSError: there is no `ip`.
        CalledProcessError: namespaces cannot be made here; its stderr says why.
    """
    mark = uuid4().hex[:6]
    first, second = (Host(f"d2l-{mark}-{n}", f"d2l{mark}{n}", f"10.77.0.{n + 1}") for n in range(2))
    try:
        for host in (first, second):
            _ip("netns", "add", host.namespace)
        _ip(
            *("link", "add", first.interface, "netns", first.namespace),
            *("type", "veth", "peer", "name", second.interface, "netns", second.namespace),
        )
        for host in (first, second):
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.plug("up")
        subprocess.run([*first.prefix, "true"], check=True, capture_output=True, text=True)
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False, capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
