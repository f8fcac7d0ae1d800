"""The files of a hub model, one at a time: what is here, what is ahead, and what does not arrive."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from lowbit.hub_shards import HubShards, copy_parts
from tests.hub_stub import MODEL, Hub, shard
from tests.refused import Refused

Make = Callable[[str], Path]


def test_one_download_is_ahead(hub: Hub, tmp_path: Path) -> None:
    shards = HubShards(MODEL, tmp_path / "source")
    assert shards.need([shard(1)], shard(2)) == [shard(1)]
    assert shards._ahead is not None
    shards._ahead.join()
    assert hub.whole[-1] == shard(2)
    assert shards.need([shard(2)]) == [shard(2)]
    assert hub.whole.count(shard(2)) == 1
    assert [path.name for path in (tmp_path / "source").glob("*.safetensors")] == [shard(2)]
    assert shards.need([shard(1)]) == [shard(1)]  # dropped, so it comes again
    shards.close()
    assert not (tmp_path / "source").exists()


def test_what_is_on_its_way_is_given_up(hub: Hub, tmp_path: Path) -> None:
    shards = HubShards(MODEL, tmp_path / "source")
    hub.answer = lambda name, content: content if name == shard(1) else time.sleep(0.3) or content
    shards.need([shard(1)], shard(2))
    ahead = shards._ahead
    assert ahead is not None
    shards.close()
    assert not ahead.is_alive()
    assert not ahead.done
    assert not (tmp_path / "source").exists()


def test_a_failure_ahead_is_tried_again(hub: Hub, tmp_path: Path) -> None:
    shards = HubShards(MODEL, tmp_path / "source")
    shards.need([shard(1)])
    hub.answer = lambda name, content: 500
    shards.need([shard(1)], shard(2))
    assert shards._ahead is not None
    shards._ahead.join()
    hub.answer = lambda name, content: content
    assert shards.need([shard(2)]) == [shard(2)]
    assert shards.has([shard(2)])
    assert shards.failures == [
        f"{MODEL}: {shard(2)} could not be downloaded (HfHubHTTPError): check the network"
    ]


def test_parts_are_copied_to_their_places(hub_models: Make, tmp_path: Path) -> None:
    whole = hub_models("blocks") / shard(1)
    content = whole.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    places = json.loads(content[8:begin])
    start, stop = places["model.embed_tokens.weight"]["data_offsets"]
    copy_parts(whole, [(start, stop)], tmp_path / "deep" / "copy.safetensors")
    copied = (tmp_path / "deep" / "copy.safetensors").read_bytes()
    assert len(copied) == len(content)
    assert copied[:begin] == content[:begin]
    assert copied[begin + start : begin + stop] == content[begin + start : begin + stop]
    assert not any(copied[begin : begin + start] + copied[begin + stop :])
    with safe_open(tmp_path / "deep" / "copy.safetensors", "pt") as opened:
        assert set(opened.keys()) == places.keys() - {"__metadata__"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda content: 500, "could not be downloaded (HfHubHTTPError): check the network"),
        (lambda content: content[:-100], "could not be downloaded (OSError): check the network"),
        (lambda content: content[:-1] + b"!", "arrived damaged"),
    ],
)
def test_a_file_that_does_not_arrive(
    hub: Hub, refused: Refused, answer: Callable[[bytes], bytes | int], expected: str
) -> None:
    hub.answer = lambda name, content: answer(content) if name.endswith(".safetensors") else content
    line = refused(MODEL, "--drop-source")
    assert line.startswith(f"{MODEL}: {shard(5)} ")  # the last norm is there, the embedding is in the first
    assert expected in line


def test_a_hub_without_weights(hub: Hub, refused: Refused, hub_models: Make, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(hub_models("single"), tmp_path / "copy"))
    (hub.folder / "model.safetensors").unlink()
    assert refused(MODEL, "--drop-source") == (
        f"{MODEL} has no weights (*.safetensors): give a model that has some"
    )


def test_a_hub_without_a_file(hub: Hub, refused: Refused, hub_models: Make, tmp_path: Path) -> None:
    hub.folder = Path(shutil.copytree(hub_models("blocks"), tmp_path / "copy"))
    (hub.folder / shard(3)).unlink()
    assert refused(MODEL, "--drop-source") == (
        f"{MODEL} lacks {shard(3)}, which its index names: give a sound model"
    )
