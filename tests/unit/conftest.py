"""Fixtures of several test modules."""

from pathlib import Path

import pytest

from tests.reward_world import BASES, World, build, copied


@pytest.fixture(scope="module", params=BASES.values(), ids=BASES.keys())
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Runs with reward stages on two bases, not to be changed."""
    return build(tmp_path_factory.mktemp("runs"), *request.param)


@pytest.fixture
def world(built: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A copy of ``built`` to change; it is the working directory."""
    return copied(built, tmp_path, monkeypatch)
