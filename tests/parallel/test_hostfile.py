"""Hostfiles: their form, hosts that do not answer, more slots than there is room for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megaseq.base.errors import ParamsError
from megaseq.parallel.hostfile import Capacity, Host, check_hosts, probe, read_hostfile

ROOT = Path(__file__).parents[2]


def problems(text: str, *, folder: Path) -> list[str]:
    path = folder / "hosts"
    path.write_text(text)
    with pytest.raises(ParamsError) as raised:
        read_hostfile(path)
    return [line.removeprefix(f"{folder}/") for line in str(raised.value).splitlines()]


def test_the_example_is_read() -> None:
    assert read_hostfile(ROOT / "launch/hostfile.example") == [
        Host(name="worker-0", slots=8, line=3),
        Host(name="worker-1", slots=8, line=4),
    ]


def test_every_bad_line_is_told(tmp_path: Path) -> None:
    text = "a slots=2\n# a comment\n\na slots=2\nb\nc slots=0\nd slots=1 # the last\n"
    assert problems(text, folder=tmp_path) == [
        "hosts:4: must name each host once, and a is on line 1, but is 'a slots=2'. Remove one of the lines.",
        "hosts:5: must look like `worker-0 slots=8`, but is 'b'. Correct the line.",
        "hosts:6: must look like `worker-0 slots=8`, but is 'c slots=0'. Correct the line.",
    ]
    assert problems("# nothing\n", folder=tmp_path) == [
        "hosts: must name at least one host, but is empty. Add `worker-0 slots=8`."
    ]
    with pytest.raises(ParamsError, match="must be a hostfile, but is missing"):
        read_hostfile(tmp_path / "none")


def test_hosts_that_do_not_answer_and_slots_beyond_what_is_there() -> None:
    hosts = [Host("a", 8, 1), Host("b", 8, 2), Host("c", 8, 3), Host("d", 8, 4)]
    answers = {"a": Capacity(8, 64), "b": None, "c": Capacity(4, 64), "d": Capacity(0, 2)}
    with pytest.raises(ParamsError) as raised:
        check_hosts(hosts, path=Path("hosts"), ask=lambda host: answers[host.name])
    assert str(raised.value).splitlines() == [
        "hosts:2: must name a host that ssh reaches without a password, but is 'b'. Check the name and its sshd, "
        "install your key there, or remove the line.",
        "hosts:3: must have at most the 4 GPUs of c as slots, but is 8. Write slots=4.",
        "hosts:4: must have at most the 2 cores of d as slots, but is 8. Write slots=2.",
    ]
    assert check_hosts(hosts[:1], path=Path("hosts"), ask=lambda host: answers[host.name]) == {"a": Capacity(8, 64)}


def test_probe_asks_this_machine_without_ssh_and_others_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = probe(Host(socket.gethostname(), 1, 1))
    assert own is not None
    assert own.cores == os.sysconf("SC_NPROCESSORS_ONLN")
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\ncase "$*" in *good*) printf "8\\n96\\n";; *) exit 255;; esac\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert probe(Host("good", 8, 1)) == Capacity(gpus=8, cores=96)
    assert probe(Host("bad", 8, 1)) is None
