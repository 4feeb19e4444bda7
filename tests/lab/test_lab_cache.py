# SPDX-License-Identifier: Apache-2.0
"""The lab's cache: entries are whole or not there, and are built once."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from holdfast.lab import cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "holdfast/lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.directory() == tmp_path / "home/.cache/holdfast/lab"


def test_an_entry_is_built_once() -> None:
    built = []

    def build(place: Path) -> None:
        built.append(place)
        (place / "file").write_text("whole")

    first = cache.get("thing", "key", build)
    assert cache.get("thing", "key", build) == first == cache.find("thing", "key")
    assert (first / "file").read_text() == "whole"
    assert len(built) == 1
    assert built[0] != first


def test_keys_tell_apart_what_only_joined_is_equal() -> None:
    assert cache.key("ab", "c") != cache.key("a", "bc")
    assert cache.key("ab", "c") == cache.key("ab", "c")


def test_a_build_that_fails_leaves_nothing(own_cache: Path) -> None:
    def fail(place: Path) -> None:
        (place / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.get("thing", "key", fail)
    assert cache.find("thing", "key") is None
    assert not [path for path in own_cache.iterdir() if path.is_dir()]


def test_a_builder_that_is_killed_is_no_obstacle_and_its_rest_is_removed(own_cache: Path) -> None:
    script = (
        "import os, signal; from holdfast.lab import cache\n"
        "def build(place):\n"
        "    (place / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.get('thing', 'key', build)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == -9
    assert cache.find("thing", "key") is None
    assert list(own_cache.glob(".building-*"))
    entry = cache.get("thing", "key", lambda place: (place / "whole").touch())
    assert [path.name for path in entry.iterdir()] == ["whole"]
    assert not list(own_cache.glob(".building-*"))


def test_a_second_builder_waits_for_the_first() -> None:
    begun, go_on = threading.Event(), threading.Event()
    built: list[str] = []

    def build(place: Path) -> None:
        begun.set()
        assert go_on.wait(10)
        built.append(place.name)

    threads = [threading.Thread(target=cache.get, args=("thing", "key", build)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert cache.find("thing", "key") is None
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_places_are_held_by_one_at_a_time_and_waiting_is_told_once() -> None:
    waits: list[int] = []
    released = threading.Event()

    def waiting() -> None:
        waits.append(1)
        released.set()

    def third() -> None:
        with cache.one_of("place", 2, waiting):
            pass

    with cache.one_of("place", 2, lambda: None) as first:
        with cache.one_of("place", 2, lambda: None) as second:
            assert {first, second} == {0, 1}
            thread = threading.Thread(target=third)
            thread.start()
            assert released.wait(10)
        thread.join(10)
        assert not thread.is_alive()
    assert waits == [1]


def test_clean_removes_everything_and_says_how_much(own_cache: Path) -> None:
    assert cache.clean() == 0

    def build(place: Path) -> None:
        (place / "f").write_bytes(b"x" * 100_000)

    cache.get("thing", "key", build)
    assert cache.clean() >= 100_000
    assert not own_cache.exists()


def test_scratch_is_gone_after_an_error(own_cache: Path) -> None:
    def use() -> None:
        with cache.scratch("run") as place:
            (place / "file").touch()
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        use()
    assert not [path for path in own_cache.iterdir() if path.is_dir()]


def test_scratch_of_the_killed_is_removed_and_that_of_the_living_is_not(own_cache: Path) -> None:
    script = (
        "import os, signal; from holdfast.lab import cache\n"
        "with cache.scratch('run'): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with cache.scratch("run") as living:
        subprocess.run([sys.executable, "-c", script], check=False)
        assert len(list(own_cache.glob(".run-*"))) == 2
        with cache.scratch("run") as other:
            assert set(own_cache.glob(".run-*")) == {living, other}
