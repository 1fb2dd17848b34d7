"""The project as a series of statements, in the order of the pipeline: scenes, pictures, text, the
stream of batches; options, schedules, checkpoints, processes; the tokenizer, its losses, files and
training; attention, the prior, sampling, the dual encoder, Adafactor, the prior's training; drawing
and measuring; the repository's own text.

    pytest -m "not slow"        # the core
    pytest                      # and real processes: kills, resumes, two processes, what learns

Numbers such as f79 are those of the facts in the README's paper map.
"""

import argparse
import ast
import csv
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import io
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import tarfile
import time
import tokenize
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

os.environ["TRITON_INTERPRET"] = "1"  # the kernels run without a GPU; before triton is imported

import torch._dynamo  # noqa: E402, F401 optimizers import it: here, once for all processes

import data  # noqa: E402
import prior  # noqa: E402
import sample  # noqa: E402
import train_prior  # noqa: E402
import train_vqgan  # noqa: E402
import vqgan  # noqa: E402
from prior import DualEncoder, Parti, PriorConfig  # noqa: E402
from vqgan import VQGAN, Discriminator, Perceptual, Upsampler  # noqa: E402

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)
slow = pytest.mark.slow  # real processes, and what takes more than a second or two
HERE = Path(__file__).parent
CIFAR = HERE.parent / "shared/data/cifar10.tar"


# --- helpers -------------------------------------------------------------------------------------

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])  # torch is imported once for all of them


def child(function, *args):
    """A process of its own: function(*args), a function of this module."""
    process = PROCESSES.Process(target=function, args=args)
    process.start()
    return process


def as_rank(out, rank, port, main):
    """What torchrun gives a process, without its seconds of importing torch."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    sys.stdout = sys.stderr = open(out / f"printed{rank}", "w", buffering=1)
    data.launch(lambda: main(out, rank))


def two_processes(out, main):
    out.mkdir(exist_ok=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [child(as_rank, out, rank, store.port, main) for rank in range(2)]
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes], "".join(
        (out / f"printed{rank}").read_text() for rank in range(2)
    )


def script(out, rank, name, argv):
    """train_vqgan.py or train_prior.py with these options, in this process."""
    torch.set_num_threads(1)
    sys.argv = [name, *argv]
    {"train_vqgan.py": train_vqgan, "train_prior.py": train_prior}[name].main()


def alone(out, main):
    """What `python script.py` is, without the seconds of importing torch."""
    sys.stdout = sys.stderr = open(out / "printed", "w", buffering=1)
    data.launch(lambda: main(out, 0))


def run_script(name, out, argv, world=1, until=None, number=signal.SIGTERM):
    """A training script as a user starts it, with --out; `until` is true: it is sent a signal."""
    out.mkdir(exist_ok=True)
    main = functools.partial(script, name=name, argv=["--out", str(out), *argv])
    if world > 1:
        codes, printed = two_processes(out, main)
    else:
        process = child(alone, out, main)
        while until and process.is_alive() and not until():
            time.sleep(0.01)
        if until:
            os.kill(process.pid, number)
        process.join(60)
        codes, printed = [process.exitcode], (out / "printed").read_text()
    assert not any(codes) or codes == [-number], printed


def main_of(script, argv, monkeypatch):
    """The script's main() with these options, in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, argv)])
    return script.main()


def picture(path, value=100, size=(40, 40), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(
        mode, size, value if mode != "RGB" or isinstance(value, tuple) else (value,) * 3
    ).save(path, **options)
    return path


def tar(path, members):
    with tarfile.open(path, "w") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                out.addfile(info)
            else:
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    return path


def jpg(value=100, size=(40, 40)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value,) * 3).save(stream, "JPEG")
    return stream.getvalue()


def names_and_captions(*args, **kwargs):
    found = data.Pictures(*args, size=8, **kwargs)
    return {name: found._captions(name) for name in found.names}


def error(function, *args, **kwargs):
    with pytest.raises(SystemExit) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert len(message) > 20 and "\n" not in message, message
    return message


# --- scenes --------------------------------------------------------------------------------------

SPLITS = ("train", "seen", "combination", "pair")


def test_a_scene_is_a_function_of_seed_split_and_index():
    first, again = (data.Scenes("train", seed=3).sample(7) for _ in range(2))
    assert (first[0] == again[0]).all() and first[1] == again[1]
    assert first[0].shape == (64, 64, 3) and first[0].dtype == np.uint8
    others = data.Scenes("train", seed=4), data.Scenes("seen", seed=3)
    assert all((first[0] != scenes.sample(7)[0]).any() for scenes in others)
    scenes = data.Scenes("train", seed=3)
    assert scenes.captions(5) == [scenes.sample(i)[1] for i in range(5)]
    large = data.Scenes(size=128, seed=3)
    assert large.sample(0)[0].shape == (128, 128, 3)
    assert large.captions(5) == scenes.captions(5), "an index is one scene at every size"
    pairs = data.open_data("", split="pair", seed=3)
    assert pairs.captions(5) == data.Scenes("pair", seed=3).captions(5)
    assert "--image-size 60" in error(data.Scenes, size=60)


def test_shapes_are_anti_aliased_and_as_large_as_they_say():
    """Large ones in boxes of 24 pixels: r 10.5, a = 18.9, 21 wide and high, two beams of 7.6."""
    for shape, area in (("circle", 346.4), ("square", 357.2), ("triangle", 220.5), ("cross", 260)):
        large, small = (
            (255 - scene((size, "blue", shape, 0, 0))[..., 0].astype(float)) / (255 - 50)
            for size in ("large", "small")
        )
        assert large.sum() == pytest.approx(area, rel=0.02), shape
        assert small.sum() == pytest.approx(area * 4 / 9, rel=0.03), shape
        assert ((0.1 < large) & (large < 0.9)).any(), "hard edges"
        upper, lower = large[:12].sum(), large[12:].sum()
        assert upper < 0.5 * lower if shape == "triangle" else abs(upper - lower) < 0.02 * area


def test_things_stand_anywhere_apart_and_in_raster_order():
    rng = np.random.default_rng(0)
    for relation, axis in (("above", 1), ("below", 1), ("left of", 0), ("right of", 0)):
        drawn = [data._place([2, 3], relation, rng) for _ in range(400)]
        boxes = np.array([pair for pair in drawn if pair])  # (n, first or second, x or y)
        assert boxes.min((0, 2)).tolist() == [0, 0] and boxes.max((0, 2)).tolist() == [6, 5]
        far = boxes[:, 1] + 1.5 - boxes[:, 0] - 1.0  # from centre to centre
        along, across = far[:, axis], abs(far[:, 1 - axis])
        along *= 1 if relation in ("above", "left of") else -1
        assert (along >= np.maximum(2.5, across + 1)).all(), "apart, and plainly so"
        if axis == 0:
            assert (boxes[:, 1, 1] == boxes[:, 0, 1].clip(max=5)).all(), "one top edge"
    rows = [data._place([2, 2, 2], None, rng) for _ in range(200)]
    assert all(a[1] == b[1] == c[1] and b[0] - a[0] == c[0] - b[0] for a, b, c in rows)
    assert {b[0] - a[0] for a, b, _ in rows} == {2, 3} and {a[1] for a, *_ in rows} == {*range(7)}
    (a, b, c) = data._place([3, 3, 3], None, rng)
    assert b[0] >= a[0] + 3 and b[1] == a[1] and c == (a[0], a[1] + 3), "like words on a page"


@pytest.mark.parametrize("split", SPLITS)
def test_the_checker_accepts_each_scene_under_its_caption_and_under_no_other(split):
    scenes = [data.Scenes(split, seed=11).sample(i) for i in range(100)]
    captions = [caption for _, caption in scenes]
    right = sum(data.check(image, caption) for image, caption in scenes)
    assert right >= 0.995 * len(scenes)
    others = captions[1:] + captions[:1]
    pairs = [(scene[0], other) for scene, other in zip(scenes, others) if other != scene[1]]
    assert sum(data.check(*pair) for pair in pairs) <= 0.01 * len(pairs)


@pytest.mark.parametrize("size", [56, 72, 104, 128])
def test_the_checker_reads_scenes_of_other_sizes(size):
    scenes = [data.Scenes("train", size, seed=5).sample(i) for i in range(60)]
    assert all(data.check(*scene) for scene in scenes)
    image, caption = scenes[0]
    assert data.check(torch.from_numpy(image).permute(2, 0, 1), caption), "uint8 as batches give it"


def test_a_caption_of_no_scene_is_refused():
    for caption in ("", "a dog", "two red circles above a blue square"):
        with pytest.raises(ValueError, match="not a caption"):
            data.check(np.zeros((64, 64, 3), np.uint8), caption)


def scene(*objects, background="white"):
    """A picture of (size, colour, shape, left, top) with places in cells."""
    return data.Scenes()._draw([o[:3] for o in objects], [o[3:] for o in objects], background)


def test_the_checker_knows_sizes_counts_relations_and_backgrounds():
    red, blue = ("large", "red", "circle", 1, 1), ("small", "blue", "square", 2, 5)
    picture = scene(red, blue)
    as_floats = torch.from_numpy(picture).permute(2, 0, 1) / 255
    for caption, right in {
        "a red circle above a blue square": True,
        "a blue square below a red circle": True,
        "a blue square under a red circle": True,
        "a large red circle over a small blue square on white": True,
        "a red circle below a blue square": False,
        "a blue square above a red circle": False,
        "a small red circle above a blue square": False,
        "a red circle": False,
        "a red square above a blue circle": False,
        "a blue circle above a red square": False,
        "a red circle above a blue square on black": False,
        "a red circle left of a blue square": False,
        "two red circles": False,
    }.items():
        assert data.check(picture, caption) == right, caption
        assert data.check(as_floats, caption) == right, caption
    beyond = torch.where(as_floats < 1, as_floats, 1.3)
    assert data.check(beyond, "a red circle above a blue square"), "as a decoder gives it"
    beside = scene(("small", "red", "circle", 1, 3), ("small", "blue", "square", 5, 3))
    for place, right in (("left of", True), ("right of", False), ("above", False)):
        assert data.check(beside, f"a red circle {place} a blue square") == right
        assert data.check(beside, f"a blue square {place} a red circle") == (place == "right of")
    assert data.check(beside, "a red circle to the left of a blue square")
    assert data.check(beside, "a blue square to the right of a red circle")
    three = scene(red, ("small", "red", "circle", 5, 0), ("large", "red", "circle", 5, 5))
    assert data.check(three, "three red circles") and not data.check(three, "two red circles")
    dark = scene(red, background="black")
    assert data.check(dark, "a red circle on a black background")
    assert not data.check(dark, "a red circle"), "no background named means white"
    kinds = ("a red circle", "two red circles", "a red circle above a blue square on grey")
    assert [data.kind(c) for c in kinds] == ["one object", "counts", "relation"]


def test_malformed_objects_are_wrong():
    caption, one = "a red circle", ("large", "red", "circle", 2, 2)
    good = scene(one)
    half, hole, smeared, tinted, spiked, dented = (good.copy() for _ in range(6))
    half[28:] = 255  # the lower half of the circle is gone
    hole[24:32, 24:32] = 255  # 18 % of its pixels
    dented[26:31, 26:31] = 255  # 7 %
    spiked[27:29, 8:48] = spiked[8:48, 27:29] = data.COLOURS["red"]  # 18 %, beyond its box
    smeared[16:40, 40:48] = data.COLOURS["red"]
    tinted[good[..., 1] < 200] = (128, 128, 40)
    assert data.check(good, caption) and data.check(dented, caption)
    for wrong in (
        half,
        hole,
        spiked,
        smeared,
        tinted,
        scene(),
        scene(one, ("small", "red", "circle", 6, 6)),
        scene(one, ("small", "blue", "cross", 6, 6)),
        scene(one, background="grey"),
        np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
    ):
        assert not data.check(wrong, caption)
    noisy = good + np.random.default_rng(0).normal(0, 6, good.shape)
    assert data.check(noisy.clip(0, 255).astype(np.uint8), caption), "a little noise is no fault"
    covered = (255 - good[..., 2:]) / 215
    for shift, right in ((30, True), (40, False)):
        assert data.check(good + covered * (0, shift, -shift), caption) == right, "another red"
    for pixels, right in ((3, True), (4, False)):
        spot = good.copy()
        spot[60, 56 : 56 + pixels] = 195  # faint, but there
        assert data.check(spot, caption) == right, "noise, or a thing too many"
    assert not data.check(good[::-1][:, ::-1] // 2 + good // 2, caption), "a ghost of another"


def test_a_tenth_of_the_combinations_is_held_out_in_both_readings():
    things = [(colour, shape) for colour in data.COLOURS for shape in data.SHAPES]
    combos = [(a, r, b) for a in things for r in data.RELATIONS for b in things]
    groups = {combo: data.group(*combo) for combo in combos}
    for (a, r, b), group in groups.items():
        assert (group == "equal") == (a == b)
        assert (group == "rare") == (a != b and bool({a, b} & data.RARE))
        assert group == groups[b, data.OPPOSITE[r], a], "one picture, two sides"
    hidden, shown = (list(groups.values()).count(group) for group in ("held out", "common"))
    assert 0.09 < hidden / (hidden + shown) < 0.11


def relations(split, n=400):
    """Of n scenes those about relations: ((colour, shape), relation, (colour, shape))."""
    read = [data.read_caption(caption) for caption in data.Scenes(split, seed=2).captions(n)]
    pairs = [(things, relation) for things, relation, _ in read if relation]
    return [(one[1:], relation, other[1:]) for (one, other), relation in pairs]


def test_what_training_never_shows():
    for split in ("train", "seen"):
        assert {data.group(*combo) for combo in relations(split)} == {"common"}
    combination, pair = relations("combination"), relations("pair")
    assert len(combination) == len(pair) == 400, "both splits are about relations"
    assert {data.group(*combo) for combo in combination} == {"held out"}
    assert {data.group(*combo) for combo in pair} == {"rare"}
    assert all({one, other} & data.RARE for one, _, other in pair)
    captions = data.Scenes(seed=2).captions(1500)
    read = [data.read_caption(caption) for caption in captions]
    alone = {tuple(things[0][1:]) for things, relation, _ in read if not relation}
    assert data.RARE <= alone, "training shows the rare pairs, but only by themselves"

    # The same captions, as English: everything that can be said is said, now and then.
    kinds = [[data.kind(caption) for caption in captions].count(kind) / 1500 for kind in data.KINDS]
    assert kinds == pytest.approx([0.08, 0.16, 0.76], abs=0.03), "one object, counts, relation"
    text = "\n".join(captions)
    for phrase in (
        *("above a", "over a", "below a", "under a", " left of a", "to the left of a"),
        *("d square right of a", "to the right of a", "two large", "three small", "three pink"),
        *("an orange", "squares", "crosses", "on white", "on a white background", "on black"),
    ):
        assert phrase in text, phrase
    assert "a orange" not in text and "crosss" not in text
    named = [bool(size) for things, *_ in read for size, _, _ in things]
    assert np.mean(named) == pytest.approx(1 / 2, abs=0.05)
    unsaid = [" on " not in caption for caption in captions]
    assert np.mean(unsaid) == pytest.approx(1 / 6, abs=0.04), "half of the white backgrounds"


# --- pictures: formats


def test_nested_folders_any_case_sorted(tmp_path):
    names = "b/00001.PNG", "b/00000.png", "a/x.JPG", "c.jpeg", "LICENSE.txt"
    for name in (*names, ".hidden.png", ".cache/y.png"):
        if name.endswith("txt"):
            (tmp_path / name).write_text("licence")
        else:
            picture(tmp_path / name)
    assert names_and_captions(tmp_path) == {
        "a/x.JPG": ["a"],
        "b/00000.png": ["b"],
        "b/00001.PNG": ["b"],
        "c.jpeg": [""],
    }
    picture(tmp_path / "fire_truck" / "1.png")
    picture(tmp_path / "00000" / "1.png")
    found = names_and_captions(str(tmp_path))
    assert found["fire_truck/1.png"] == ["fire truck"] and found["00000/1.png"] == [""]


def test_metadata_jsonl_and_csv_in_subfolders(tmp_path):
    for name in ("train/1.png", "train/sub/2.png", "test/1.png", "other.png"):
        picture(tmp_path / name)
    (tmp_path / "train/metadata.jsonl").write_bytes(
        b"\xef\xbb\xbf"
        + "\n".join(
            [
                '{"file_name": "1.png", "prompt": "", "caption": "", "text": "a line\u2028sep"}',
                json.dumps({"file_name": "./sub/2.png", "caption": "two"}),
                "",
                "",
            ]
        ).encode()
    )
    with open(tmp_path / "test/metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "prompt"], ["1.png", 'comma, "quote"\nnew line']])
    (tmp_path / "train/1.txt").write_text("a list comes before a file beside the picture")
    assert names_and_captions(tmp_path) == {
        "test/1.png": ['comma, "quote" new line'],
        "train/1.png": ["a line sep"],
        "train/sub/2.png": ["two"],
    }


@pytest.mark.parametrize(
    "name", ["/etc/x.png", "../x.png", "a/../../x.png", "https://h/x.png", "C:\\x.png", "..\\x.png"]
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "coco", "tar"])
def test_paths_outside_are_refused(tmp_path, name, kind):
    picture(tmp_path / "x.png")
    captions = None
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "t"}))
    elif kind == "csv":
        (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},t\n")
    elif kind == "coco":
        captions = tmp_path / "c.json"
        captions.write_text(
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": name}],
                    "annotations": [{"image_id": 1, "caption": "t"}],
                }
            )
        )
    else:
        tar(tmp_path / "x.tar", {name: b"x"})
    message = error(data.Pictures, tmp_path, captions)
    assert name in message and ".." in message


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_in_tars_are_refused(tmp_path, kind):
    tar(tmp_path / "x.tar", {"a.jpg": jpg(), "b.jpg": (kind, "/etc/passwd")})
    message = error(data.Pictures, tmp_path)
    assert "b.jpg" in message and "link" in message


@pytest.mark.parametrize(
    "content", ["not json", '{"file_name": "x.png"}', '["x.png"]', '{"text": "x"}', "3"]
)
def test_metadata_that_is_wrong(tmp_path, content):
    picture(tmp_path / "x.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    message = error(data.Pictures, tmp_path)
    assert "metadata.jsonl" in message and "file_name" in message and "text" in message


def test_metadata_csv_that_is_wrong(tmp_path):
    picture(tmp_path / "x.png")
    (tmp_path / "metadata.csv").write_text("a,b\n1,2\n")
    assert "metadata.csv" in error(data.Pictures, tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\ny.png,t\n")
    assert "no picture" in error(data.Pictures, tmp_path)
    (tmp_path / "metadata.csv").write_bytes("file_name,text\nx.png,café\n".encode("latin-1") * 9999)
    message = error(data.Pictures, tmp_path)  # not a caption with a hole, not the file's content
    assert "utf-8" in message and len(message) < 400


def test_captions_come_from_all_over_the_pictures(tmp_path):
    for i in range(120):
        picture(tmp_path / "abc"[i // 40] / f"{i:03}.png")
    pictures = data.Pictures(tmp_path)
    assert set(pictures.captions(80)) == set(pictures.captions(3)) == {"a", "b", "c"}
    assert len(pictures.captions(80)) == 80 and len(pictures.captions(999)) == len(pictures)


def test_sidecar_captions(tmp_path):
    for name in ("a/x.png", "b/x.png", "c/v1.2.png", "c/none.png"):
        picture(tmp_path / name)
    (tmp_path / "a/x.txt").write_bytes("\ufeffone\r\n\r\n  two  words \n".encode())
    (tmp_path / "b/x.txt").write_text("other", encoding="utf-8")
    (tmp_path / "c/v1.2.txt").write_text("d\u00e9j\u00e0 vu", encoding="utf-8")
    (tmp_path / "c/v1.txt").write_text("wrong")
    assert names_and_captions(tmp_path) == {
        "a/x.png": ["one", "two words"],
        "b/x.png": ["other"],
        "c/v1.2.png": ["d\u00e9j\u00e0 vu"],
        "c/none.png": [""],
    }
    found = data.Pictures(tmp_path, size=8)
    drawn = {found.sample(0, np.random.default_rng(i))[1] for i in range(20)}
    assert drawn == {"one", "two words"}
    assert found.captions(99) == ["one", "two words", "other", "", "d\u00e9j\u00e0 vu"]
    assert len(found.captions(2)) == 2
    (tmp_path / "c/none.json").write_text('{"text": "half a pair: \\ud83d"}')
    assert "half a pair: ?" in data.Pictures(tmp_path).captions(99)  # what can be encoded


def test_coco_captions(tmp_path):
    for name in ("train2017/1.jpg", "train2017/2.jpg", "train2017/3.jpg", "val2017/4.jpg"):
        picture(tmp_path / name)
    captions = tmp_path / "captions.json"
    coco = {
        "images": [
            {"id": 7, "file_name": "1.jpg"},
            {"id": 5, "file_name": "2.jpg"},
            {"id": 6, "file_name": "val2017/4.jpg"},
        ],
        "annotations": [
            {"image_id": 5, "caption": "two\nlines"},
            {"image_id": 7, "caption": "one"},
            {"image_id": 5, "caption": "again"},
            {"image_id": 99, "caption": "lost"},
            {"image_id": 6, "caption": "four"},
        ],
    }
    captions.write_text(json.dumps(coco))
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain2017/3.jpg,not asked for\n")
    expected = {
        "train2017/1.jpg": ["one"],
        "train2017/2.jpg": ["two lines", "again"],
        "val2017/4.jpg": ["four"],
    }
    assert names_and_captions(tmp_path, captions) == expected
    assert names_and_captions(tmp_path, str(captions)) == expected
    captions_deep = tmp_path / "deep"
    (
        picture(captions_deep / "images/v/5.jpg"),
        picture(captions_deep / "images/uv/5.jpg"),
        (captions_deep / "c.json").write_text(
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "v/5.jpg"}],
                    "annotations": [{"image_id": 1, "caption": "c"}],
                }
            )
        ),
    )
    assert names_and_captions(captions_deep, captions_deep / "c.json") == {"images/v/5.jpg": ["c"]}
    picture(tmp_path / "val2017/1.jpg")
    message = error(data.Pictures, tmp_path, captions)
    assert "train2017/1.jpg" in message and "val2017/1.jpg" in message
    captions.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "zz.jpg"}],
                "annotations": [{"image_id": 1, "caption": "c"}],
            }
        )
    )
    assert "no picture" in error(data.Pictures, tmp_path, captions)
    captions.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    assert "Git-LFS" in error(data.Pictures, tmp_path, captions)
    for wrong in ("not json", "[]", "{}", '{"images": [{"id": 1}], "annotations": []}', ""):
        captions.write_text(wrong)
        assert "COCO" in error(data.Pictures, tmp_path, captions)
    assert "nowhere.json" in error(data.Pictures, tmp_path, "nowhere.json")
    assert "captions.json" in error(data.Pictures, tmp_path, "captions.json"), "not the data's own"
    assert "--data" in error(data.open_data, "", "nowhere.json")


def test_webdataset_shards(tmp_path):
    tar(
        tmp_path / "00000.tar",
        {
            "k1.jpg": jpg(10),
            "k1.txt": b"first",
            "k1.json": b'{"caption": "not me"}',
            "k2.v2.jpg": jpg(20),
            "k2.json": b'{"caption": "from\\njson"}',
            "k3.jpg": jpg(30),
            "k3.txt": b"",
            "k4.jpg": jpg(40),
            "k4.json": b"{}",
        },
    )
    tar(tmp_path / "00001.tar", {"./k1.JPG": jpg(50), "./k1.txt": "caf\u00e9".encode()})
    assert names_and_captions(tmp_path) == {
        "00000.tar/k1.jpg": ["first"],
        "00000.tar/k2.v2.jpg": ["from json"],
        "00000.tar/k3.jpg": [""],
        "00000.tar/k4.jpg": [""],
        "00001.tar/k1.JPG": ["caf\u00e9"],
    }
    found = data.Pictures(tmp_path, size=8)
    rng = np.random.default_rng(0)
    assert [int(found.sample(i, rng)[0].mean()) for i in range(5)] == [10, 20, 30, 40, 50], (
        "a member's bytes are not its own"
    )
    assert names_and_captions(tmp_path / "00001.tar") == {"k1.JPG": ["caf\u00e9"]}
    assert not [p for p in tmp_path.iterdir() if p.suffix != ".tar"], "something was unpacked"
    with tarfile.open(tmp_path / "00002.tar", "w:gz") as out:
        out.add(tmp_path / "00001.tar", "x")
    assert "uncompressed" in error(data.Pictures, tmp_path)


def test_a_shard_that_is_cut_anywhere_is_refused(tmp_path):
    whole = tar(tmp_path / "x.tar", {f"{i}.jpg": jpg() for i in range(3)})
    content, members = whole.read_bytes(), tarfile.open(whole).getmembers()
    last = members[-1]
    end = last.offset_data + -(-last.size // 512) * 512  # from here on it is only zeros
    cuts = [0, 100, 900, last.offset - 1, last.offset, last.offset + 100, last.offset_data]
    for cut in (*cuts, last.offset_data + 9, end - 1, end, end + 100):
        whole.write_bytes(content[:cut])
        assert "x.tar" in error(data.Pictures, tmp_path), f"cut at {cut}, members are lost silently"
    whole.write_bytes(content[: last.offset] + b"?" * 512 + content[last.offset + 512 :])
    assert "x.tar" in error(data.Pictures, tmp_path)
    whole.write_bytes(content[: end + 512])
    assert len(data.Pictures(tmp_path, size=8)) == 3, "one closing block is enough"


def test_a_shard_without_captions_has_none(tmp_path):
    tar(tmp_path / "train.tar", {"a.jpg": jpg(), "dog/b.jpg": jpg()})
    assert names_and_captions(tmp_path) == {"train.tar/a.jpg": [""], "train.tar/dog/b.jpg": ["dog"]}


@slow
@pytest.mark.skipif(not CIFAR.exists(), reason="needs the photographs")
def test_cifar10_as_it_is():
    train, val = (data.Pictures(CIFAR, size=32, split=split) for split in ("train", "val"))
    assert len(train) + len(val) == 10_000 and 150 < len(val) < 250
    assert not set(train.names) & set(val.names)
    assert set(train.captions(1000)) == set(
        "airplane automobile bird cat deer dog frog horse ship truck".split()
    )
    pixels, caption = val.sample(3, np.random.default_rng(0))
    assert (
        pixels.shape == (32, 32, 3)
        and pixels.dtype == np.uint8
        and caption == "airplane"
        and pixels.std() > 5
    )


def test_small_folders_are_both_splits(tmp_path):
    picture(tmp_path / "x.png")
    assert len(data.Pictures(tmp_path)) == len(data.Pictures(tmp_path, split="val")) == 1


def test_one_name_in_fifty_is_held_out_whatever_comes_later(tmp_path):
    before = set()
    for n in (1000, 1500):
        path = tar(tmp_path / "x.tar", {f"{i:04}.jpg": b"" for i in range(n)})
        train, held = (set(data.open_data(path, split=split).names) for split in ("train", "seen"))
        assert not train & held and len(train | held) == n
        assert len(held) / n == pytest.approx(1 / 50, rel=0.4) and before <= held
        before = held


def test_errors_of_the_path(tmp_path):
    assert "nowhere" in error(data.Pictures, tmp_path / "nowhere")
    assert "no picture" in error(data.Pictures, tmp_path)
    assert "x.png" in error(data.Pictures, picture(tmp_path / "x.png"))


# --- pictures: modes and crops


def opened(tmp_path, image, ending="png", **options):
    image.save(tmp_path / f"x.{ending}", **options)
    result = data.open_image(tmp_path / f"x.{ending}")
    assert result.mode == "RGB"
    return result


def test_every_mode(tmp_path):
    def centre(image, ending="png", **options):
        return opened(tmp_path, image, ending, **options).getpixel((4, 4))

    assert centre(Image.new("RGBA", (9, 9), (255, 0, 0, 128))) == (255, 127, 127), (
        "alpha dropped, not composited"
    )
    assert centre(Image.new("RGBA", (9, 9), (0, 0, 0, 0))) == (255, 255, 255)
    assert centre(Image.new("LA", (9, 9), (0, 0))) == (255, 255, 255)
    palette = Image.new("P", (9, 9), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert centre(palette) == (10, 20, 30)
    assert centre(palette, transparency=1) == (255, 255, 255)
    assert centre(palette, "gif") == (10, 20, 30)
    assert centre(Image.new("L", (9, 9), 77)) == (77, 77, 77)
    assert centre(Image.new("1", (9, 9), 1)) == (255, 255, 255)
    assert centre(Image.fromarray(np.full((9, 9), 65535, np.uint16))) == (255, 255, 255)
    for value, grey in ((257 * 100, 100), (257 * 200, 200), (25_900, 101)):  # 100.8
        image = Image.fromarray(np.full((9, 9), value, np.uint16))
        assert centre(image) == (grey,) * 3, "I;16 clipped, not scaled"
    assert centre(Image.fromarray(np.full((9, 9), 257 * 100, np.uint16)), "tif") == (100, 100, 100)
    red = centre(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "jpg", quality=100)
    assert red[0] > 240 and red[1] < 15 and red[2] < 15
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    assert centre(frames[0], "gif", save_all=True, append_images=frames[1:]) == (255, 0, 0)
    assert centre(Image.new("RGB", (9, 9), (1, 2, 3)), "webp", lossless=True) == (1, 2, 3)


def test_exif_rotation_comes_first(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    for draft in (math.inf, 8):
        image.save(tmp_path / "x.jpg", exif=exif, quality=95)
        result = data.open_image(tmp_path / "x.jpg", draft)
        assert result.height == 2 * result.width
        top = result.getpixel((result.width // 2, 1))
        assert top[0] > 200 and top[1] < 60, "the red half must be on top"


def bad_files(folder):
    picture(folder / "ok.jpg", size=(200, 200))
    good = (folder / "ok.jpg").read_bytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    noise.save(folder / "ok.png")
    png = (folder / "ok.png").read_bytes()
    header = struct.pack(">II", 100_000, 100_000) + b"\x08\x02\0\0\0"
    chunk = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    broken = {
        "truncated.jpg": good[: len(good) // 2],
        "truncated.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "html.jpg": b"<!DOCTYPE html><html></html>",
        "bomb.png": png[:8] + chunk + png[33:],
        "flipped.png": png[:200] + b"\xff\xff\xff\xff" + png[204:],
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    return sorted(broken)


def test_bad_files_raise_os_error(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(OSError):
            data.open_image(tmp_path / name)
    data.open_image(tmp_path / "ok.jpg"), data.open_image(tmp_path / "ok.png")
    with pytest.raises(OSError):
        data.open_image(tmp_path / "missing.png")


class Recorder:
    """A generator that remembers the bounds it was asked for (high made inclusive)."""

    def __init__(self):
        self.rng, self.calls, self.drawn = np.random.default_rng(0), [], []

    def integers(self, low, high=None, size=None, endpoint=False):
        result = self.rng.integers(low, high, size=size, endpoint=endpoint)
        low, high = (0, low) if high is None else (low, high)
        self.calls.append((low, high if endpoint else high - 1))
        self.drawn.append(result)
        return result


def test_f4_f5_f6_crop_ranges_of_the_papers():
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (600, 1000, 3), dtype=np.uint8)
    )
    rng = Recorder()
    assert data.tokenizer_crop(image, 256, rng).shape == (256, 256, 3)
    assert rng.calls[:3] == [(0, 400), (0, 0), (288, 384)]
    assert rng.calls[3] == (0, rng.drawn[2] - 256) and rng.drawn[3].shape == (2,), "the cut: x, y"
    rng = Recorder()
    assert data.prior_crop(image, 256, rng).shape == (256, 256, 3)
    assert rng.calls[:3] == [(150, 249), (0, 0), (256, 288)] and len(rng.calls) == 4, (
        "no flip in stage 2"
    )
    for side, expected in ((300, (288, 300)), (256, (256, 256)), (100, (256, 256))):
        rng = Recorder()
        assert data.tokenizer_crop(image.resize((side + 9, side)), 256, rng).shape == (256, 256, 3)
        assert rng.calls[2] == expected
    for size in ((1, 1), (1, 5000), (5000, 1), (257, 3000)):
        for crop in (data.tokenizer_crop, data.prior_crop, data.centre_crop):
            assert crop(image.resize(size), 256, np.random.default_rng(0)).shape == (256, 256, 3)
    assert (data.centre_crop(image, 600) == np.asarray(image)[:, 200:800]).all(), "the middle"


def test_f7_shrinking_averages_areas_and_f5_never_flips():
    image = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.unique(data.centre_crop(image, 32)).tolist() == [128], (
        "a chequerboard must become grey"
    )
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))).convert("RGB")
    flips = {
        bool(data.tokenizer_crop(ramp, 16, np.random.default_rng(i))[0, 0, 0] > 128)
        for i in range(20)
    }
    assert flips == {True, False}
    enlarged = data.centre_crop(ramp.crop((0, 0, 8, 8)), 32)
    assert len(np.unique(enlarged)) > 8, "small pictures grow smoothly"
    assert not any(
        data.prior_crop(ramp, 16, np.random.default_rng(i))[0, 0, 0] > 128 for i in range(20)
    )


def test_draft_mode_keeps_the_range_of_t(tmp_path):
    picture(tmp_path / "big.jpg", size=(1600, 1200))
    assert min(data.open_image(tmp_path / "big.jpg", draft=96).size) == 150
    assert min(data.open_image(tmp_path / "big.jpg", draft=384).size) == 600
    assert data.open_image(tmp_path / "big.jpg").size == (1600, 1200)
    seen = data.open_data(tmp_path, size=256, crop=lambda image, size, rng: image.size)
    assert seen.sample(0, np.random.default_rng(0))[0] == (800, 600), "384 is the largest t of 256"


def test_a_grid_shows_rows_in_order_pixel_by_pixel_above_their_labels(tmp_path):
    black, grey, white = (torch.full((3, 64, 64), value) for value in (-0.5, 0.5, 1.5))
    rows = [torch.stack([black, grey]), white[None], torch.stack([grey, black])]
    rows[2][0, :, 0, 0] = 0
    data.save_grid(tmp_path / "x.png", rows)
    sheet = np.asarray(Image.open(tmp_path / "x.png"))  # twice as large, 2 pixels of white around
    assert sheet.shape == (3 * 132, 2 * 132, 3)
    centres = sheet[66::132, 66::132, 0].tolist()
    assert centres == [[0, 128], [255, 255], [128, 0]], "a value beyond [0,1] wraps around"
    assert sheet[266:269, 2:5, 0].tolist() == [[0, 0, 128], [0, 0, 128], [128, 128, 128]]
    data.save_grid(tmp_path / "x.png", [white[None]] * 2, ["one", "two"])
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    inked = np.nonzero((sheet < 128).any((1, 2)))[0]
    assert len(sheet) == 300 and {y // 150 for y in inked} == {0, 1}
    assert all(y % 150 >= 132 for y in inked), "a label below its row"
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]


# --- text


def test_text_tokens(capsys):
    captions = [
        f"a {colour} {shape}"
        for colour in ("red", "green", "blue")
        for shape in ("circle", "square")
    ] * 20
    model = data.train_tokens(captions)
    assert isinstance(model, bytes) and model == data.train_tokens(captions)
    text = data.Text(model, length=12)
    assert 260 < text.vocab < 400
    ids = text(["a red circle", "", "A RED circle", "\u732b", "circle " * 30])
    assert ids.shape == (5, 12) and ids.dtype == torch.int64
    assert ids[1].tolist() == [0] * 12 and ids[0].tolist() == ids[2].tolist()
    assert (ids[0] == 3).sum() == 1 and (ids[0] > 0).sum() == 4, (
        "words of the scenes are single tokens"
    )
    assert not (ids == 1).any(), "byte fallback leaves nothing unknown"
    assert ids[4, 11] == 3 and text.truncated == 1 and int(ids.max()) < text.vocab
    assert "cut, so far: 1" in capsys.readouterr().out
    short = data.Text(model, length=4)
    assert short(["a red circle"])[0, 3] == 3 and short.truncated == 0, "just fits, EOS and all"
    assert short(["a red circle a"] * 12)[0].tolist() == short(["a red circle"])[0].tolist()
    assert short.truncated == 12 and capsys.readouterr().out.count("cut, so far") == 2  # 1st, 10th
    assert text([]).shape == (0, 12)
    assert text.pieces.decode(ids[3].tolist()) == "\u732b"
    assert data.Text(data.train_tokens(["dog"])).vocab > 259
    message = error(data.train_tokens, ["", " "])
    assert "0 captions" in message and "--captions" in message
    assert "--pieces 10 from 120 captions" in error(data.train_tokens, captions, 10)


# --- stream


def stack(iterator):
    images, texts = zip(*iterator)
    return torch.stack(images), [list(t) for t in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    for i in range(60):
        noise = np.random.default_rng(i).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / f"{i:03}.png")
        (path / f"{i:03}.txt").write_text(f"number {i}\nno. {i}")
    return path


def test_order_depends_on_nothing_but_seed_and_step(folder):
    pictures = data.Pictures(folder, size=16)
    everything, captions = stack(data.batches(pictures, 8, 3, 0, 12, drop=0.3))
    assert everything.shape == (12, 8, 3, 16, 16) and everything.dtype == torch.uint8
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for workers in (1, 2):
        again, texts = stack(data.batches(pictures, 8, 3, 0, 12, workers=workers, drop=0.3))
        assert torch.equal(again, everything) and texts == captions, "the workers change the data"
    assert torch.equal(torch.get_rng_state(), state), "loading disturbs torch's random state"
    resumed, texts = stack(data.batches(pictures, 8, 3, 7, 12, workers=2, drop=0.3))
    assert torch.equal(resumed, everything[7:]) and texts == captions[7:], (
        "a resume changes the data"
    )
    ranks = [stack(data.batches(pictures, 8, 3, 0, 12, rank, 2, drop=0.3)) for rank in range(2)]
    assert torch.equal(torch.cat([images for images, _ in ranks], 1), everything), (
        "processes change the data"
    )
    assert [a + b for a, b in zip(ranks[0][1], ranks[1][1])] == captions
    assert not torch.equal(stack(data.batches(pictures, 8, 4, 0, 12))[0], everything)
    flat = [caption for step in captions for caption in step]
    assert 0.15 < flat.count("") / len(flat) < 0.45
    model = data.Text(data.train_tokens(pictures.captions(100)), 16)
    images, ids = next(data.batches(pictures, 8, 3, 0, 1, drop=0.3, text=model))
    assert torch.equal(ids, model(captions[0])) and torch.equal(images, everything[0])


def test_an_epoch_sees_every_picture_once(folder):
    pictures = data.Pictures(folder, size=16)
    n = len(pictures)

    def shown(seed, first):
        stream = data.Stream(pictures, seed)
        return [int(stream[first + i][1].split()[-1]) for i in range(n)]

    everything = sorted(int(name[:3]) for name in pictures.names)
    epochs = shown(1, 0), shown(1, n), shown(2, 0)
    assert all(sorted(epoch) == everything != epoch for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != epochs[2], "an order of its own for each seed"
    one, two = (data.Stream(data.Scenes(size=8), seed, drop=0.5) for seed in (1, 2))
    assert [one[i][1] == "" for i in range(40)] != [two[i][1] == "" for i in range(40)]


def test_scenes_never_repeat():
    scenes = data.open_data("", size=8)
    images, captions = stack(data.batches(scenes, 2, 0, 600_000, 600_001))
    for i, (pixels, caption) in enumerate(map(scenes.sample, (1_200_000, 1_200_001))):
        assert caption == captions[0][i] and (images[0, i].permute(1, 2, 0).numpy() == pixels).all()


def with_bad(path, good, bad):
    for i in range(good):
        picture(path / f"{i:04}.png", i % 256, size=(9, 9))
    for i in range(bad):
        (path / f"bad{i}.png").write_bytes(b"no picture")
    return data.Pictures(path, size=8)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_few_bad_files_are_skipped_and_named_once(tmp_path, capsys, workers):
    pictures = with_bad(tmp_path, 98, 2)  # 2 %, not more
    first = stack(data.batches(pictures, 10, 0, 0, 36, workers=workers))
    printed = capsys.readouterr()
    for i in range(2):
        assert (printed.out + printed.err).count(f"bad{i}.png") == 1
    again = stack(data.batches(pictures, 10, 0, 0, 36))
    assert torch.equal(first[0], again[0]) and first[0].shape[:2] == (36, 10)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("good", [97, 0])
def test_more_than_2_percent_of_bad_files_stop_with_the_list(tmp_path, workers, good):
    pictures = with_bad(tmp_path, good, 3)
    message = error(lambda: list(data.batches(pictures, 10, 0, 0, 30, workers=workers)))
    assert "2 %" in message and all(f"bad{i}.png" in message for i in range(3))


@pytest.mark.parametrize("every, least, most", [(20, 30, 50), (1, 0, 0)])
def test_a_million_pictures_stop_at_200_bad_ones_or_100_in_a_row(every, least, most):
    """Long before the bad ones are 2 % of all: 200 of them are met among 4,000 if 5 % are bad."""

    class Million:
        names = texts = range(10**6)
        size = 8

        def __len__(self):
            return 10**6

        def sample(self, index, rng):
            if index % every == 0:
                raise OSError("rotten")
            return np.zeros((8, 8, 3), np.uint8), ""

    stream, read = data.batches(Million(), 100, 0, 0, 1000), 0
    with pytest.raises(SystemExit, match="2 %"):
        for read, _ in enumerate(stream, 1):
            pass
    assert least <= read <= most


def test_each_stream_counts_its_own_bad_files(tmp_path, capsys):
    pictures = with_bad(tmp_path, 118, 2)  # 2.4 are 2 %
    assert len(list(data.batches(pictures, 10, 0, 0, 24))) == 24
    for i in range(2):
        picture(tmp_path / f"bad{i}.png", size=(9, 9))
        (tmp_path / pictures.names[5 + i]).write_bytes(b"no picture")
    assert len(list(data.batches(pictures, 10, 0, 0, 24))) == 24


def test_a_disk_that_is_gone_stops_at_once(tmp_path):
    pictures = with_bad(tmp_path, 120, 0)
    for file in tmp_path.iterdir():
        file.unlink()
    message = error(next, data.batches(pictures, 1, 0, 0, 9))
    assert message.count("No such file") == 100, "one black picture in place of 100 bad files"


def test_one_bad_file_among_few_held_out_ones_stops_nothing(tmp_path, capsys):
    with_bad(tmp_path, 200, 0)
    held_out = data.Pictures(tmp_path, size=8, split="seen")
    (tmp_path / held_out.names[0]).write_bytes(b"no picture")
    assert len(held_out) < 20, "one of these is more than 2 %, but not of the 200"
    for _ in range(2):
        assert len(list(data.batches(held_out, len(held_out), 0, 0, 1))) == 1
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("skipped a bad picture") == 1, "named once"


def test_a_file_that_vanishes_is_a_bad_file(tmp_path):
    pictures = with_bad(tmp_path, 100, 0)
    (tmp_path / pictures.names[5]).unlink()
    assert len(list(data.batches(pictures, 10, 0, 0, 10))) == 10


def test_batch_must_divide(tmp_path):
    argv = ["--out", str(tmp_path), "--device", "cpu", "--batch", "6", "--accumulate", "4"]
    options, _, recipe = data.parse("", data.Options(), SIZES_OF, train_prior.RECIPES, argv=argv)
    assert "--batch" in error(data.Run, options, recipe, "x", 0, vqgan.read)


# --- options


@dataclasses.dataclass
class Options:
    data: str = ""
    preset: str = ""
    compile: bool = False
    workers: int = dataclasses.field(default=0, metadata={"help": "loader processes"})
    device: str = dataclasses.field(default="auto", metadata={})


@dataclasses.dataclass
class Config:
    image_size: int = 64
    laplace: bool = True

    def __post_init__(self):
        if self.image_size % 8:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 8")


@dataclasses.dataclass
class Recipe:
    lr: float = 1e-3
    steps: int = 100
    warmup: int = 10
    decay_from: int = 0
    final: float = 0.5
    schedule: str = "cosine"


SIZES_OF = {"tiny": Config(), "small": Config(256)}
RECIPES_OF = {"tiny": Recipe(), "small": Recipe(1e-4, 500_000)}


def parsed(*argv):
    return data.parse("doc", Options(), SIZES_OF, RECIPES_OF, "small", list(argv))


def test_options():
    options, config, recipe = parsed()
    assert (options.preset, config, recipe) == ("tiny", Config(), Recipe())
    options, config, recipe = parsed(
        "--data", "x", "--lr=0.5", "--no-laplace", "--compile", "--workers", "3"
    )
    assert (options.preset, config, recipe) == ("small", Config(256, False), Recipe(0.5, 500_000))
    assert options.compile is True and options.workers == 3 and SIZES_OF["small"].laplace
    assert parsed("--preset", "small", "--image-size", "128")[1] == Config(128)
    assert parsed("--preset", "small", "--image-size", "64")[1] == Config(64), (
        "an override equal to tiny's value is one"
    )
    assert data.parse("doc", Options(), argv=["--data", "y"])[0].data == "y"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--stpes", "3"], ["--stpes"]),
        (["--step", "3"], ["--step"]),
        (["--preset", "huge"], ["huge", "tiny", "small"]),
        (["--lr", "fast"], ["--lr", "fast"]),
        (["--lr", "-1"], ["--lr", "-1"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--steps", "1.5"], ["--steps", "1.5"]),
        (["--workers", "-1"], ["--workers", "-1"]),
        (["stray"], ["stray"]),
        (["--image-size", "13"], ["image_size 13", "multiple of 8"]),
        (["--image-size", "0"], ["--image-size 0", "1"]),
        (["--steps", "0"], ["--steps 0", "1"]),
        (["--compile", "yes"], ["yes"]),
        (["--lr", "inf"], ["--lr inf"]),
        (["--steps", "1" + "0" * 13], ["--steps 1", "to 10"]),
    ],
)
def test_wrong_options(argv, words):
    message = error(parsed, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "script, presets, wrong",
    [
        (train_vqgan, vqgan.PRESETS, "--patch 0"),
        (train_vqgan, vqgan.PRESETS, "--heads 0"),
        (train_vqgan, vqgan.PRESETS, "--schedule quadratic"),
        (train_prior, prior.PRESETS, "--heads 0"),
        (train_prior, prior.PRESETS, "--accumulate 0"),
        (train_prior, prior.PRESETS, "--log-every 0"),
    ],
)
def test_sizes_of_nothing_are_refused_and_what_may_be_off_is_not(script, presets, wrong):
    def parsed(argv):
        return data.parse("", script.Options(), presets, script.RECIPES, argv=argv.split())

    assert wrong.split()[0] in error(parsed, wrong)
    recipe = parsed("--warmup 0 --decay-from 0 --seed 0 --workers 0 --clip inf")[2]
    assert recipe.warmup == 0 and recipe.clip == math.inf


def test_sizes_that_come_from_elsewhere_are_no_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_prior.py", "--codes", "5"])
    assert "--codes" in error(train_prior.main)


def test_one_process_has_nothing_to_shard(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train_prior.py", "--fsdp", "--out", str(tmp_path)])
    assert "torchrun" in error(train_prior.main)


def test_what_cannot_be_shared_out_is_refused(monkeypatch, tmp_path):
    def refused(*options):
        return error(main_of, train_prior, [*options, "--out", tmp_path], monkeypatch)

    assert "whole batch" in refused("--stage", "text", "--accumulate", 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "divides the width 128" in refused("--fsdp")


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parsed("--help")
    text = capsys.readouterr().out
    assert (
        caught.value.code == 0
        and "loader processes" in text
        and "--image-size" in text
        and "--no-laplace" in text
    )


def test_on_a_cpu_bfloat16_is_for_wide_matrices_and_float32_for_who_asks(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)  # as if it had them
    assert data.pick("cpu", "auto", 512)[1] == torch.bfloat16
    assert data.pick("cpu", "auto", 128)[1] == data.pick("cpu", "float32", 512)[1] == torch.float32


def test_device_and_dtype():
    assert data.pick("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    device, dtype = data.pick()
    assert isinstance(device, torch.device) and dtype in (torch.float32, torch.bfloat16)
    if not torch.cuda.is_available():
        assert "cuda" in error(data.pick, "cuda") and device.type == "cpu"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # as if there were two
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert "process 2 has no GPU" in error(data.pick) and data.pick("cpu")[0].type == "cpu"


def test_names_of_devices_and_types():
    assert "tpu" in error(data.pick, "tpu") and "float16" in error(data.pick, "cpu", "float16")


# --- schedules


def test_f49_f99_f100_schedules():
    parti = train_prior.PAPER
    for step, expected in (
        (200_000, 1.408e-5),
        (267_500, 7.115e-6),
        (450_000, 1.125e-6),
        (85_000, 4.5e-5),
        (5_000, 4.5e-5),
        (2_500, 2.25e-5),
        (1, 9e-9),
        (40_000, 4.5e-5),
        (460_000, 1.125e-6),
    ):
        assert parti.rate(step) == pytest.approx(expected, rel=1e-3), step
    vit = train_vqgan.PAPER
    for step, expected in ((25_000, 5e-5), (50_000, 1e-4), (275_000, 7.5e-5), (500_000, 5e-5)):
        assert vit.rate(step) == pytest.approx(expected), step
    line = dict(lr=1.0, steps=100, decay_from=50, final=0.0, schedule="linear", weight_decay=0.0)
    line = data.Recipe(**line)
    assert [line.rate(step) for step in (1, 50, 75, 100, 101)] == [1, 1, 0.5, 0, 0]
    tiny = train_vqgan.RECIPES["tiny"]  # the rate falls when quantisation starts
    assert tiny.rate(901) / tiny.rate(900) == pytest.approx(0.5, abs=0.01)


# --- checkpoints, logs

CONFIG = {"width": 64, "sizes": (1, 2)}


def new_run(out, steps=100, **options):
    recipe = data.Recipe(steps=steps, batch=2, lr=0.1, weight_decay=0.0)
    options = data.Options(out=str(out), device="cpu", **options)
    return data.Run(options, recipe, "prior", 0, vqgan.read)


@pytest.fixture
def restore_signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start_run(out, **options):
    run = new_run(out, **options)
    run.resume(CONFIG)
    return run, run.saved


def test_save_and_resume(tmp_path, capsys, restore_signals):
    run, found = start_run(tmp_path)
    assert found is None and (run.rank, run.world, run.main, run.device.type) == (0, 1, True, "cpu")
    run.skipped = 5
    for step in (1, 2):
        weights = {"w": torch.full((9,), step)}
        run.save(step, {"model": weights, "moments": [torch.arange(3), None], "words": 6})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prior.prev.pt", "prior.pt"]
    assert torch.load(tmp_path / "prior.prev.pt", weights_only=True)["step"] == 1
    (tmp_path / "prior.pt.tmp").write_bytes(b"stale")
    run, found = start_run(tmp_path)
    assert (found["step"], found["config"], run.start, run.skipped) == (2, CONFIG, 2, 5)
    assert found["model"]["w"].eq(2).all() and not (tmp_path / "prior.pt.tmp").exists()
    assert "step 2 of 100" in capsys.readouterr().out
    other = {"width": 96, "sizes": (1, 2), "depth": 3}
    message = error(new_run(tmp_path).resume, other)
    assert (
        "width 64 there, 96 here" in message
        and "depth" in message
        and "--fresh" in message
        and "sizes" not in message
    )
    capsys.readouterr()
    run, found = start_run(tmp_path, steps=200)
    assert found["step"] == 2 and "steps 100 there, 200 here" in capsys.readouterr().out
    message = error(new_run(tmp_path, steps=200).resume, CONFIG, "steps")
    assert "steps 100 there, 200 here" in message, "a field of the recipe that must not change"
    message = error(lambda: new_run(tmp_path, steps=200).resume(CONFIG, words=7))
    assert "words 6 there, 7 here" in message and "steps" not in message, "only what is wrong"
    run, found = start_run(tmp_path, fresh=True)
    assert found is None and (tmp_path / "prior.pt").exists()
    run.save(100, {})
    assert start_run(tmp_path)[1]["step"] == 100 and "finished" in capsys.readouterr().out


def test_networks_that_are_not_the_checkpoints_are_refused(tmp_path, restore_signals):
    def started(**networks):
        run, _ = start_run(tmp_path)
        return run, run.together(networks, lambda net, recipe: torch.optim.AdamW(net.parameters()))

    run, [net] = started(model=nn.Linear(3, 2))
    weights, moments = net.state_dict(), {"state": {}, "param_groups": []}
    run.save(1, {"model": weights, "optimizer": moments})
    for networks in ({"model": nn.Linear(4, 2)}, {"discriminator": nn.Linear(3, 2)}):
        message = error(started, **networks)
        assert "prior.pt cannot be continued" in message and "--fresh" in message
    run.save(2, {"model": {"weight": weights["weight"]}, "optimizer": moments})
    assert "other weights" in error(started, model=nn.Linear(3, 2)), "none starts afresh unnoticed"


def test_between_the_two_renames(tmp_path, restore_signals):
    run, _ = start_run(tmp_path)
    run.save(7, {})
    os.replace(tmp_path / "prior.pt", tmp_path / "prior.prev.pt")
    assert start_run(tmp_path)[1]["step"] == 7


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, "html", "but one bit"])
def test_damaged_checkpoint_names_the_way_out(tmp_path, keep, restore_signals):
    run, _ = start_run(tmp_path)
    run.save(1, {"w": torch.ones(1000)})
    run.save(2, {"w": torch.ones(1000)})
    content = (tmp_path / "prior.pt").read_bytes()
    if keep == "html":
        content = b"<html>" * 100
    elif keep == "but one bit":  # of a weight: torch itself would load it
        place = content.index(torch.ones(9).numpy().tobytes())
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    else:
        content = content[: int(keep * len(content)) if isinstance(keep, float) else keep]
    (tmp_path / "prior.pt").write_bytes(content)
    message = error(new_run, tmp_path)
    assert "prior.pt is damaged" in message and ".prev.pt" in message and "--fresh" in message
    assert "does not exist" in error(vqgan.read, tmp_path / "vqgan.pt")
    torch.save([1, 2], tmp_path / "prior.pt")
    assert "of another kind" in error(new_run, tmp_path)


def save_for_ever(out):
    run = new_run(out, steps=10**9)
    run.resume({"width": 1})
    found, step = run.saved, run.start
    assert not found or all((w == step).all() for w in found["model"]), "a torn checkpoint"
    (out / "writing").write_text(str(step))
    os.replace(out / "writing", out / "began")  # whole or not there: the kill may come at once
    while True:
        step += 1
        run.log(step, {"loss": step / 2})  # in this order: no step is missing after a kill
        run.save(step, {"model": [torch.full((50_000,), float(step)) for _ in range(4)]})


@slow
def test_kill_9_at_any_moment(tmp_path):
    steps, rng = [], np.random.default_rng(0)
    for _ in range(20):
        process = child(save_for_ever, tmp_path)
        while not (tmp_path / "began").exists() and process.is_alive():
            time.sleep(0.002)
        time.sleep(0.06 * rng.random())
        process.kill()
        process.join()
        assert process.exitcode == -9, "the child failed by itself"
        steps.append(int((tmp_path / "began").read_text()))
        (tmp_path / "began").unlink()
        saved = (
            tmp_path / "prior.pt"
            if (tmp_path / "prior.pt").exists()
            else tmp_path / "prior.prev.pt"
        )
        if saved.exists():
            assert torch.load(saved, weights_only=True)["step"] >= steps[-1]
    assert steps == sorted(steps) and steps[-1] > 5, steps
    rows = (tmp_path / "prior.csv").read_text().split("\n")
    logged = [int(row.split(",")[0]) for row in rows[1:] if row]
    assert rows[0] == "step,loss" and logged == list(range(1, len(logged) + 1)), (
        "a step is missing or there twice"
    )


def die_at(out, fatal):
    run, count = new_run(out), 0
    run.resume({})

    def save(step):
        run.save(step, {"w": torch.ones(99_999)})

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal count
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return call

    save(1), save(2)
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    save(3)


@slow
def test_every_point_of_the_kill(tmp_path, restore_signals):
    """Die exactly before each call that touches the disk, so also between the two renames."""
    found, codes = [], []
    for fatal in range(4):
        process = child(die_at, tmp_path / str(fatal), fatal)
        process.join()
        codes.append(process.exitcode)
        found.append(new_run(tmp_path / str(fatal)).saved["step"])
    assert codes == [-9, -9, -9, 0] and found == [2, 2, 2, 3]


def fill_the_disk(out):
    """A disk that fills up after two checkpoints of step 4; the loop itself meets it."""
    sys.stdout = sys.stderr = open(out / "printed", "w", buffering=1)
    run, net = new_run(out, steps=4), nn.Linear(300, 300)
    run.resume({})
    run.save(1, {}), run.save(2, {})
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def losses_of(step, x):
        yield {"loss": net(x).sum()}

    run.together({"model": net}, lambda net, recipe: torch.optim.SGD(net.parameters(), recipe.lr))
    run.train([(torch.ones(2, 300),)] * 4, losses_of, lambda step: {}, ())


@slow
def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    process = child(fill_the_disk, tmp_path)
    process.join()
    printed = (tmp_path / "printed").read_text()
    assert process.exitcode == 1 and "Traceback" not in printed
    assert printed.count("was not saved") == 1 and printed.count("make room") == 1
    assert torch.load(tmp_path / "prior.pt", weights_only=True)["step"] == 2
    assert torch.load(tmp_path / "prior.prev.pt", weights_only=True)["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_log_is_appended_and_never_twice(tmp_path, restore_signals):
    run, _ = start_run(tmp_path)
    for step in range(1, 6):
        run.log(step, {"loss": step / 10, "psnr": 20.5 if step == 4 else None})
    run.log(3, {"loss": 9, "psnr": 9})
    run.save(3, {})
    with open(tmp_path / "prior.csv", "a") as file:
        file.write("6,9")  # torn by a kill
    run, found = start_run(tmp_path)
    for step in range(found["step"] + 1, 8):
        run.log(step, {"psnr": None, "more": 1, "loss": step / 10})  # the file's columns count
    rows = list(csv.DictReader(open(tmp_path / "prior.csv")))
    assert [int(row["step"]) for row in rows] == list(range(1, 8))
    assert [float(row["loss"]) for row in rows] == [i / 10 for i in range(1, 8)] and rows[3][
        "psnr"
    ] == "20.5"
    run, _ = start_run(tmp_path, fresh=True)
    run.log(1, {"loss": 1, "psnr": 2})
    assert (
        len((tmp_path / "prior.csv").read_text().splitlines()) == 2
        and (tmp_path / "prior.prev.csv").exists()
    )


def test_wandb_missing_is_said(tmp_path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is here")
    assert "pip install wandb" in error(new_run, tmp_path, wandb=True)


def test_wandb_when_it_is_there(tmp_path, monkeypatch, restore_signals):
    (tmp_path / "wandb.py").write_text(
        "calls = []\ndef init(**k): calls.append(k); return __import__('wandb')\n"
        "def log(row, step): calls.append((step, row))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run, _ = start_run(tmp_path, wandb=True)
    run.log(1, {"loss": 2.0})
    import wandb

    assert wandb.calls[0]["project"] == "parti" and wandb.calls[1] == (1, {"loss": 2.0})
    sys.modules.pop("wandb")


@slow
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_itself_offline(tmp_path):
    command = [sys.executable, str(HERE / "train_vqgan.py"), "--wandb", "--out", str(tmp_path)]
    command += ["--steps", "2", "--autoencoder", "0", "--mosaic", "0"]
    offline = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run(command, check=True, env=offline, timeout=120)
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    assert "--out" in error(new_run, tmp_path / "out")


@pytest.mark.parametrize(
    "says, advice",
    [("you tried to allocate 8 bytes", "--batch"), ("No C++ compiler", "--compile")],
)
def test_errors_of_torch_that_a_user_can_mend_are_one_line(says, advice):
    def main():
        raise RuntimeError(f"{says}\nand much more")

    message = error(data.launch, main)
    assert says in message and advice in message and "more" not in message


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(28, "No space left")])
def test_what_stops_from_outside_says_that_the_same_command_continues(stop):
    def main():
        raise stop

    message = error(data.launch, main)
    assert "the same command continues" in message and (str(stop) or "Ctrl-C") in message


def test_not_finite_steps(tmp_path):
    run = new_run(tmp_path)
    for _ in range(3):
        for _ in range(19):
            assert run.agree(torch.tensor(False)) == (False, False)
        assert run.agree(torch.tensor(True)) == (True, False)
    assert run.skipped == 57
    run.stopping = True
    assert run.agree(True) == (True, True)
    message = error(lambda: [run.agree(False) for _ in range(20)])
    assert "20 steps" in message and "--lr" in message and "prior.pt" in message


LOOP = dict(steps=7, batch=4, accumulate=2, warmup=2, lr=0.1, schedule="linear", decay_from=4)
LOOP |= dict(final=0.5, clip=5.0, weight_decay=0.0, log_every=2, save_every=4)
MEANS = 1, 2, -3, 10, 1, math.inf, 4  # of the numbers x in the batches of the 7 steps


def loop(out, rank=0, momentum=0.0, dtype="float32", kill=None, **changes):
    """Run.train with two networks of one weight: w·x, whose loss has the gradient mean(x), and a
    critic with twice that. At step 5 a loss is not finite, at step 6 the gradient alone."""
    recipe = data.Recipe(**LOOP | changes)
    options = data.Options(out=str(out), device="cpu", dtype=dtype)
    run = data.Run(options, recipe, "loop", 0, vqgan.read)
    run.resume({})
    networks = {key: nn.Linear(1, 1, bias=False) for key in ("model", "discriminator")}
    for network in networks.values():
        nn.init.zeros_(network.weight)
    net, critic = run.together(
        networks, lambda net, recipe: torch.optim.SGD(net.parameters(), recipe.lr, momentum)
    )
    weight = networks["model"].weight

    def losses_of(step, x):
        assert len(x) == recipe.batch // recipe.accumulate // run.world
        assert net(x).dtype == run.dtype
        before = 0 if weight.grad is None else weight.grad.clone()
        noise = torch.rand(()) / (step != 5)
        yield {"loss": net(x).mean().nan_to_num(), "noise": noise}
        assert not torch.equal(weight.grad, before + torch.zeros(1)), "the critic sees its gradient"
        if step == kill:
            os.kill(os.getpid(), signal.SIGTERM)
        yield {"critic": (2 * critic(x).mean()).nan_to_num()}

    batches = [mean * torch.tensor([[0.0], [0.5], [1.5], [2.0]]) for mean in MEANS]
    batches = [x.nan_to_num(math.inf, math.inf).chunk(run.world)[rank] for x in batches]
    stream = ((x,) for x in batches[run.start : recipe.steps])
    run.train(stream, losses_of, lambda step: {"w": weight.item()}, ["w"])
    return run, [network.weight.item() for network in networks.values()]


def test_the_loop_in_closed_form(tmp_path, restore_signals):
    """w = -Σ rate·gradient, with warm-up and decay, clipped at 5, without steps 5 and 6."""
    run, (w, critic) = loop(tmp_path)
    assert w == pytest.approx(-(0.05 * 1 + 0.1 * 2 - 0.1 * 3 + 0.1 * 5 + 0.05 * 4))
    assert critic == pytest.approx(-(0.05 * 2 + 0.1 * 4 - 0.1 * 5 + 0.1 * 5 + 0.05 * 5))
    log = log_of(tmp_path, "loop")
    assert column(log, "step") == [2, 4, 6, 7] and column(log, "skipped") == [0, 0, 2, 2]
    loss, norm, rate = (column(log, name) for name in ("loss", "grad_norm", "lr"))
    assert [loss[i] for i in (0, 1, 3)] == pytest.approx([-0.05 * 2, 0.05 * 10, -0.45 * 4])
    assert [norm[i] for i in (0, 1, 3)] == pytest.approx([2, 10, 4]), "before it is clipped"
    assert [rate[i] for i in (0, 1, 3)] == pytest.approx([0.1, 0.1, 0.05])
    assert [row["w"] for row in log[::2]] == ["", ""], "measured when saved, alone"
    assert column(log, "w") == pytest.approx([-0.45, -0.65])
    saved = [torch.load(tmp_path / name, weights_only=True) for name in ("loop.prev.pt", "loop.pt")]
    assert [one["step"] for one in saved] == [4, 7] and run.skipped == saved[1]["skipped"] == 2
    loop(tmp_path / "short", dtype="bfloat16", steps=1)


def test_the_loop_stopped_and_continued_is_the_loop(tmp_path, restore_signals):
    """SIGTERM in step 3: that step is finished and saved; momentum and dropout are as they were."""
    _, whole = loop(tmp_path / "whole", momentum=0.9)
    run, _ = loop(tmp_path / "parts", momentum=0.9, kill=3)
    assert torch.load(run.path, weights_only=True)["step"] == 3 and run.stopping
    run, parts = loop(tmp_path / "parts", momentum=0.9)
    assert run.start == 3 and parts == whole
    loop(tmp_path / "other", seed=1)
    log, again, other = (log_of(tmp_path / name, "loop") for name in ("whole", "parts", "other"))
    for name in log[0].keys() - {"seconds"}:
        assert [row[name] for row in log] == [row[name] for row in again], name
    noise = column(log, "noise") + column(other, "noise")
    assert len({*noise}) == 8, "dropout repeats itself, over steps or over seeds"


class Endless:
    def __len__(self):
        return 10**6

    def sample(self, index, rng=None):
        return np.zeros((8, 8, 3), np.uint8), ""


def train_until_stopped(out):
    os.setsid()
    sys.stdout = sys.stderr = open(out / "printed", "w", buffering=1)
    run = new_run(out)
    run.resume({})
    for step, _ in enumerate(data.batches(Endless(), 2, 0, 0, 10**6, workers=1)):
        if step == 3:
            (out / "ready").touch()
        time.sleep(0.05)
        _, stop = run.agree(True)
        if stop:
            run.save(step, {})
            break
    print("saved")


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_once_and_exit(tmp_path, number):
    process = child(train_until_stopped, tmp_path)
    while not (tmp_path / "ready").exists() and process.is_alive():
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does: the workers are hit too
    process.join(20)
    assert process.exitcode == 0 and (tmp_path / "printed").read_text() == "saved\n"
    assert torch.load(tmp_path / "prior.pt", weights_only=True)["step"] >= 3


# --- many processes


def agree_and_save(out, rank):
    run = new_run(out)
    assert run.world == 2 and dist.get_backend() == "gloo"
    run.resume({})
    assert run.agree(rank == 0) == (False, False) and run.skipped == run.start + 1  # it carries on
    run.stopping = rank == 1
    assert run.agree(True) == (True, True)
    mean = data.average(torch.tensor(float(rank))).item()
    run.log(run.start + 1, {"world": run.world, "rank": mean})
    run.save(run.start + 1, {})
    data.say("said once")


@slow
def test_two_processes_agree_save_and_resume(tmp_path):
    for expected in (1, 2):
        codes, printed = two_processes(tmp_path, agree_and_save)
        assert codes == [0, 0], printed
        assert printed.count("said once") == 1
        assert torch.load(tmp_path / "prior.pt", weights_only=True)["step"] == expected
    assert (tmp_path / "prior.csv").read_text().split() == ["step,world,rank", "1,2,0.5", "2,2,0.5"]


@slow
def test_two_processes_take_the_steps_of_one_with_a_dropout_of_their_own(tmp_path):
    _, weights = loop(tmp_path / "one")
    codes, printed = two_processes(tmp_path / "two", loop)
    assert codes == [0, 0], printed
    one, two = (log_of(tmp_path / name, "loop") for name in ("one", "two"))
    for name in ("loss", "critic", "grad_norm", "w", "skipped"):
        assert column(one, name)[:2] == pytest.approx(column(two, name)[:2]), name
    assert column(two, "w")[-1] == pytest.approx(weights[0]) and len(two) == 4
    assert column(two, "noise")[0] != column(one, "noise")[0], "a mean of two that differ"


def fail(out, rank, where):
    if where == "one before" and rank == 1:
        raise SystemExit("the one message")
    run = new_run(out)
    run.resume({})
    for step in range(1000):
        if step == 3 and (where == "both" or rank == 1):
            raise KeyError("the one message") if where == "crash" else SystemExit("the one message")
        run.agree(True)
        dist.all_reduce(torch.ones(3))


@slow
@pytest.mark.parametrize("where", ["one", "both", "crash"])
def test_processes_fail_together_with_one_message(tmp_path, where):
    codes, printed = two_processes(tmp_path, functools.partial(fail, where=where))
    assert codes == [1, 1], printed
    assert printed.count("the one message\n") + printed.count("KeyError: 'the one message'") == 1, (
        printed
    )
    assert printed.count("Traceback") == (where == "crash"), printed


@slow
def test_torchrun_itself(tmp_path):
    """A process fails before it has met the others: torchrun ends them, one message comes."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(HERE)!r}]\nimport test_shapes as t, os\n"
        f"out, rank = t.Path({str(tmp_path)!r}), int(os.environ['RANK'])\n"
        "t.data.launch(lambda: t.fail(out, rank, 'one before'))\n"
    )
    begin = time.time()
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (
        result.returncode == 1 and (result.stdout + result.stderr).count("the one message") == 1
    ), result.stderr
    assert 'script.py", line' not in result.stderr and time.time() - begin < 40


# --- the tokenizer

TINY = dataclasses.replace(vqgan.PRESETS["tiny"], image_size=32, codes=64)


def tokenizer_and_images(**changes):
    torch.manual_seed(0)
    return VQGAN(dataclasses.replace(TINY, **changes)), torch.rand(4, 3, 32, 32)


def written_out(network):
    """Random weights for it; these, its linear maps and its norms in float64, by name."""
    for p in network.parameters():
        nn.init.normal_(p, mean=p.ndim == 1, std=0.3)
    w = {name: value.double() for name, value in network.state_dict().items()}

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])

    return w, linear, norm


# --- configuration and network -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name, layers, heads, width, mlp",
    [("small", 8, 8, 512, 2048), ("base", 12, 12, 768, 3072), ("large", 32, 16, 1280, 5120)],
)
def test_f16_presets_are_table_2_and_build_on_the_meta_device(name, layers, heads, width, mlp):
    config = vqgan.PRESETS[name]
    assert config.sizes() == config.sizes("decoder_") == (width, layers, heads, mlp)
    assert (config.codes, config.code_dim, config.beta, config.patch) == (8192, 32, 0.25, 8)
    with torch.device("meta"):
        model = VQGAN(config)
        z = model.latents(torch.rand(1, 3, 256, 256))
        assert z.shape == (1, 1024, 32)  # F14
        assert model.decoder_maps(z).shape == (1, 6, 256, 256)
    blocks = sum(p.numel() for n, p in model.encoder.blocks.named_parameters() if p.ndim == 2)
    assert blocks == 12 * width**2 * layers  # F17


def test_f56_larger_decoder_is_the_large_tower_under_the_same_encoder():
    config = vqgan.larger_decoder(vqgan.PRESETS["small"])
    assert config.sizes() == vqgan.PRESETS["small"].sizes() and not config.logit_laplace
    assert config.sizes("decoder_") == vqgan.PRESETS["large"].sizes()
    tiny = vqgan.larger_decoder(vqgan.PRESETS["tiny"])
    assert tiny.sizes() == vqgan.PRESETS["tiny"].sizes() and tiny.sizes("decoder_")[0] > 128


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"image_size": 60}, ("60", "8")),
        ({"heads": 3}, ("128", "3")),
        ({"decoder_width": 100, "decoder_heads": 3}, ("100", "3")),
    ],
)
def test_sizes_that_do_not_fit_are_one_line_naming_them(changes, words):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(vqgan.PRESETS["tiny"], **changes)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)
    model, _ = tokenizer_and_images()
    with pytest.raises(ValueError, match="48"):
        model.encode(torch.rand(1, 3, 48, 48))


def test_f14_a_token_is_one_patch_in_raster_order():
    model, images = tokenizer_and_images(layers=1)
    model.encoder.blocks = nn.Sequential()  # without attention a patch reaches one token only
    before = model.latents(images)
    images[:, :, 8:16, 24:32] += 0.5  # row 1, column 3 of a 4 x 4 grid
    changed = (model.latents(images) != before).any(-1).any(0)
    assert changed.nonzero().flatten().tolist() == [7]
    model.decoder.blocks = nn.Sequential()
    z = torch.randn(1, 16, model.config.code_dim)
    a = model.decoder_maps(z)
    z[:, 7] += 1
    where = (model.decoder_maps(z) != a).any(1)[0].nonzero()
    assert where.min(0).values.tolist() == [8, 24] and where.max(0).values.tolist() == [15, 31]


def test_f21_f22_a_tower_is_pre_norm_blocks_a_tanh_head_and_a_bare_linear_map():
    tower = tokenizer_and_images()[0].encoder.double()
    (w, linear, norm), images = written_out(tower), torch.randn(2, 16, 192).double()
    x = linear(images, "embed") + w["positions"]
    qkv = linear(norm(x, "blocks.0.norm1"), "blocks.0.qkv").view(2, 16, 3, 4, 32)  # 4 heads of 32
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = (q @ k.mT / 32**0.5).softmax(-1) @ v
    x = x + linear(mixed.transpose(1, 2).reshape(2, 16, 128), "blocks.0.out")
    x = x + linear(F.gelu(linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.0")), "blocks.0.mlp.2")
    x = linear(linear(norm(x, "norm"), "head.0").tanh(), "head.2")
    assert torch.allclose(tower(images), linear(x, "project"))
    assert w["head.0.weight"].shape == (4 * 128, 128)


@pytest.mark.parametrize("laplace", [True, False])
def test_f28_at_first_codes_are_normal_blocks_add_a_constant_and_pictures_are_grey(laplace):
    model, images = tokenizer_and_images(logit_laplace=laplace, codes=4096)
    assert abs(model.codebook.mean()) < 0.01 and abs(model.codebook.std() - 1) < 0.01
    patches = vqgan.patchify(images, 8)
    for tower in (model.encoder, model.decoder):
        x = torch.randn(2, 16, 128)
        assert (tower.blocks(x) - x).std((0, 1)).max() < 1e-6
        assert tower.positions.std().item() == pytest.approx(0.02, rel=0.1)
        assert tower.head[0].weight.std().item() == pytest.approx((2 / 640) ** 0.5, rel=0.03)
    dark, light = model.encoder.embed(patches), model.encoder.embed(1 - patches)
    assert torch.allclose(dark, -light, atol=1e-5), "pixels are not seen in [-1, 1]"
    assert model(images)[0].mean().item() == pytest.approx(0.5, abs=0.05)


# --- quantizer ---------------------------------------------------------------------------------


def test_f27_largest_cosine_is_smallest_distance():
    a, b = F.normalize(torch.randn(500, 16), dim=-1), F.normalize(torch.randn(64, 16), dim=-1)
    squared = torch.cdist(a.double(), b.double()) ** 2
    assert torch.allclose(squared, 2 - 2 * a.double() @ b.double().T, atol=1e-6)
    assert torch.equal(vqgan.nearest(a, b), squared.argmin(-1))


def test_f29_unit_weight_moves_the_codebook_and_beta_the_encoder():
    model, images = tokenizer_and_images(beta=0.4)
    z = model.latents(images).detach().requires_grad_()
    z_q, loss, tokens = model.quantise(z)
    e = F.normalize(model.codebook, dim=-1)[tokens]
    squared = (z - e).square().sum(-1).mean()  # Eq. 1: sum over the code width
    assert torch.allclose(loss, 1.4 * squared)
    grad_z, grad_e = torch.autograd.grad(loss, (z, model.codebook))
    assert torch.allclose(grad_z, 0.4 * torch.autograd.grad(squared, z, retain_graph=True)[0])
    assert torch.allclose(grad_e, torch.autograd.grad(squared, model.codebook)[0])


def test_f27_gradients_pass_through_the_normalisation_of_both_sides():
    model, images = tokenizer_and_images()
    z = model.latents(images)
    assert torch.allclose(z.norm(dim=-1), torch.ones(4, 16))  # F26
    _, loss, tokens = model.quantise(z)
    (grad,) = torch.autograd.grad(loss, model.codebook)
    assert grad.norm() > 0 and (grad * model.codebook).sum(-1).abs().max() < 1e-6, "not tangential"
    raw = torch.randn(4, 16, model.config.code_dim, requires_grad=True)
    (grad,) = torch.autograd.grad(model.quantise(F.normalize(raw, dim=-1))[1], raw)
    assert (grad * raw).sum(-1).abs().max() < 1e-6 < grad.norm()


def test_f29_straight_through_gives_the_encoder_the_decoders_gradient():
    model, images = tokenizer_and_images()
    z = model.latents(images).detach().requires_grad_()
    z_q, _, tokens = model.quantise(z)
    weight = torch.randn_like(z_q)
    grad, codes = torch.autograd.grad((z_q * weight).sum(), (z, model.codebook), allow_unused=True)
    assert torch.equal(grad, weight) and codes is None, "codes learn from the codebook loss alone"
    assert torch.allclose(z_q, F.normalize(model.codebook, dim=-1)[tokens], atol=1e-6)


def test_quantizer_is_float32_under_autocast():
    model, images = tokenizer_and_images()
    z = model.latents(images)
    with torch.autocast("cpu", torch.bfloat16):
        z_q, loss, tokens = model.quantise(z)
        assert model.latents(images).dtype == model.decoder_maps(z_q).dtype == torch.float32
        total = sum(value.float().mean() for value in model(images)[:2])
    assert z_q.dtype == loss.dtype == torch.float32 and torch.equal(tokens, model.encode(images))
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_forward_is_encode_then_decode():
    model, images = tokenizer_and_images()
    recon, loss, tokens = model(images)
    assert tokens.dtype == torch.int64 and loss.ndim == 0 and recon.shape == images.shape
    assert torch.equal(tokens, model.encode(images))
    assert torch.allclose(recon, model.decode(tokens), atol=1e-5)
    louder = VQGAN(dataclasses.replace(model.config, code_scale=3.0))
    louder.load_state_dict(model.state_dict())
    with torch.no_grad():
        model.decoder.embed.weight *= 3.0 / model.config.code_scale
        model.codebook *= 7  # only directions count
    assert torch.allclose(louder.decode(tokens), model.decode(tokens), atol=1e-5)
    assert torch.equal(model.encode(images), tokens)


def test_raw_maps_and_the_picture_come_from_one_forward():
    model, images = tokenizer_and_images(logit_laplace=True)
    maps, _, _ = model(images, raw=True)
    assert maps.shape == (4, 6, 32, 32) and torch.equal(vqgan.view(maps), model(images)[0])


def test_without_quantisation_every_parameter_still_has_a_gradient():
    model, images = tokenizer_and_images()
    recon, loss, _ = model(images, quantise=False)
    assert loss == 0 and torch.equal(recon, vqgan.view(model.decoder_maps(model.latents(images))))
    (recon.square().mean() + loss).backward()
    assert all(p.grad is not None for p in model.parameters()), "DDP would hang"
    assert model.codebook.grad.abs().max() == 0


def test_f59_decoder_finetuning_leaves_token_ids_bit_identical():
    model, images = tokenizer_and_images()
    before = model.encode(images)
    tuned = VQGAN(vqgan.larger_decoder(model.config))
    tuned.encoder.load_state_dict(model.encoder.state_dict())
    tuned.codebook.data.copy_(model.codebook.data)
    tuned.requires_grad_(False).decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(3):
        recon, codebook_loss, _ = tuned(images)
        assert not codebook_loss.requires_grad
        losses.append((recon - images).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and torch.equal(tuned.encode(images), before)
    assert tuned.fingerprint() == model.fingerprint(), "a prior would not know its tokenizer again"
    tuned.codebook.data[-1, -1] += 1e-3
    assert tuned.fingerprint() != model.fingerprint()


@slow
def test_kmeans_uses_every_code_and_is_quick():
    torch.manual_seed(0)
    model = VQGAN(dataclasses.replace(vqgan.PRESETS["tiny"], codes=1024))
    # 24,000 near-equal background latents and 6,000 others
    latents = torch.randn(30_000, model.config.code_dim)
    latents[:24_000] = 1 + 0.01 * latents[:24_000]
    start = time.time()
    model.init_codebook(latents)
    assert time.time() - start < 20
    _, _, tokens = model.quantise(F.normalize(latents, dim=-1)[None])
    first = model.codebook.data.clone()
    assert len(tokens.unique()) > 0.95 * 1024
    assert torch.allclose(first.norm(dim=-1), torch.ones(1024))
    assert len(tokens[0, :24_000].unique()) < 150, "the background takes the codes"
    model.init_codebook(latents)
    assert torch.equal(first, model.codebook), "the same latents must give the same codes"
    model.init_codebook(latents[-100:])
    _, loss, _ = model.quantise(F.normalize(latents[-100:], dim=-1)[None])
    assert loss < 1e-6, "of fewer latents than codes, each must get one"


def test_f32_usage_and_perplexity():
    tokens = torch.arange(64).repeat(256, 1)
    usage, perplexity = vqgan.codebook_usage(tokens, 128)
    assert usage == 0.5 and abs(perplexity - 64) < 1e-3
    half = torch.cat([torch.zeros(256, 4), torch.ones(256, 4)]).long()  # each batch has one code
    assert vqgan.codebook_usage(half, 4) == pytest.approx((0.25, 2.0))  # over all tokens


# --- losses ------------------------------------------------------------------------------------


def test_f42_psnr_of_the_reported_l2():
    images = torch.full((2, 3, 8, 8), 0.5)
    assert vqgan.psnr(images, images + math.sqrt(3.09e-3)).tolist() == pytest.approx(
        [25.1] * 2, abs=0.01
    )
    off = images + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)  # each picture has its own
    assert vqgan.psnr(images, off).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert vqgan.psnr(torch.ones(1, 3, 8, 8), torch.full((1, 3, 8, 8), 1.2)).item() == math.inf


@pytest.mark.parametrize("mu, log_b", [(0.0, 0.0), (1.0, -1.0), (-0.5, -2.0)])
def test_f35_logit_laplace_is_a_density_on_the_unit_interval(mu, log_b):
    """Its mass is 1; half of it is where logit x is below mu, half within b ln 2 of mu."""
    b = math.exp(log_b) + 0.01
    x = (mu + b * math.log(2) * torch.linspace(-20, 20, 801, dtype=torch.double)).sigmoid()
    maps = torch.tensor([mu] * 3 + [log_b] * 3).view(1, 6, 1, 1).double()
    images = ((x - 0.1) / 0.8).view(-1, 1, 1, 1, 1).expand(-1, 1, 3, 2, 2)  # phi^-1(x)
    losses = [vqgan.logit_laplace_loss(maps.expand(1, 6, 2, 2), image) for image in images]
    density = torch.stack(losses).neg().exp()
    for part, mass in ((slice(801), 1), (slice(401), 0.5), (slice(380, 421), 0.5)):
        assert torch.trapezoid(density[part], x[part]).item() == pytest.approx(mass, abs=1e-3)
    pair = vqgan.logit_laplace_loss(maps.expand(2, 6, 2, 2), torch.cat([images[9], images[500]]))
    assert pair.item() == pytest.approx((losses[9] + losses[500]).item() / 2)


def test_f36_view_inverts_the_squeeze_and_the_loss_is_lowest_there():
    images = torch.rand(2, 3, 8, 8)
    mu = (0.8 * images + 0.1).logit()
    maps = torch.cat([mu, torch.full_like(mu, -4.0)], 1)
    assert torch.allclose(vqgan.view(maps), images, atol=1e-6)
    best = vqgan.logit_laplace_loss(maps, images)
    assert (
        best < vqgan.logit_laplace_loss(torch.cat([mu + 0.1, maps[:, 3:]], 1), images) and best < 0
    )
    extreme = torch.cat([mu, torch.full_like(mu, -99.0)], 1).requires_grad_()
    assert vqgan.logit_laplace_loss(extreme, images.round()).isfinite()


def test_f43_f47_logistic_losses_and_lazy_r1():
    scores = torch.tensor([-3.0, 0.5, 40.0])
    assert torch.allclose(
        vqgan.generator_loss(scores), -scores.double().sigmoid().log().mean().float()
    )
    expected = -(
        scores.double().sigmoid().log() + (1 - scores.double()[[1, 0, 0]].sigmoid()).log()
    ).mean()
    assert torch.allclose(vqgan.discriminator_loss(scores, scores[[1, 0, 0]]), expected.float())
    images, weight = torch.rand(5, 3, 8, 8, requires_grad=True), torch.randn(3, 8, 8)
    linear = ((2 * images - 1) * weight).sum((1, 2, 3))  # slope on [-1, 1] pixels: weight
    expected = 16 * 10 / 2 * weight.square().sum()
    assert torch.allclose(vqgan.r1_penalty(linear, images), expected)
    discriminator = Discriminator(16, cap=8)
    vqgan.r1_penalty(discriminator(F.interpolate(images, 16)), images).backward()
    grads = [p.grad for n, p in discriminator.named_parameters() if n.endswith("weight")]
    assert all(g is not None and g.norm() > 0 for g in grads), "the penalty does not train D"


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("lpips")
    vgg, lin, channels, index = {"classifier.0.weight": torch.zeros(2)}, {}, 3, 0
    for c in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
        if c:
            vgg[f"features.{index}.weight"] = torch.randn(c, channels, 3, 3) / math.sqrt(
                4.5 * channels
            )
            vgg[f"features.{index}.bias"] = 0.1 * torch.randn(c)
            channels = c
        index += 2 if c else 1
    for i, c in enumerate((64, 128, 256, 512, 512)):
        lin[f"lin{i}.model.1.weight"] = torch.rand(1, c, 1, 1)
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(lin, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth", vgg, lin


def test_f39_perceptual_is_lpips_on_vgg16(lpips_files):
    vgg_path, lpips_path, vgg, lin = lpips_files
    perceptual = Perceptual(vgg_path, lpips_path)
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32, requires_grad=True)
    # the same thing layer by layer of torchvision's numbering
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (((2 * t - 1).permute(0, 2, 3, 1) - mean).div(std).permute(0, 3, 1, 2) for t in (a, b))
    total, taps = 0, {3: 0, 8: 1, 15: 2, 22: 3, 29: 4}
    for i in range(30):
        if f"features.{i}.weight" in vgg:
            x, y = (
                F.conv2d(t, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1)
                for t in (x, y)
            )
        elif i in (4, 9, 16, 23):
            x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
        else:
            x, y = x.relu(), y.relu()
        if i in taps:
            u, v = (t / (t.square().sum(1, keepdim=True).sqrt() + 1e-10) for t in (x, y))
            total = total + F.conv2d((u - v) ** 2, lin[f"lin{taps[i]}.model.1.weight"]).mean((2, 3))
    distance = perceptual(a, b)
    assert torch.allclose(distance, total.mean(), rtol=1e-4) and perceptual(a, a) == 0
    assert torch.autograd.grad(distance, b)[0].norm() > 0
    assert not list(perceptual.parameters()), "VGG must be frozen"


def perceptual_run(monkeypatch, out, *files):
    """The line that train_vqgan.py stops with."""
    argv = ["train_vqgan.py", "--perceptual", "0.1", "--out", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*argv, "--vgg", str(files[0]), "--lpips", str(files[1])])
    message = error(train_vqgan.main)
    assert "\n" not in message and "prev" not in message and "--perceptual 0" in message
    return message


def test_perceptual_without_weights_stops_with_what_to_do(lpips_files, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(vqgan, "VGG", ("file:///nowhere/vgg16.pth", "0" * 64))
    assert "nowhere" in perceptual_run(monkeypatch, tmp_path, "", "")
    # other content under the address is refused, the right content accepted and kept
    monkeypatch.setattr(vqgan, "VGG", (f"file://{lpips_files[0]}", "0" * 64))
    assert "hash" in perceptual_run(monkeypatch, tmp_path, "", lpips_files[1])
    digest = hashlib.sha256(lpips_files[0].read_bytes()).hexdigest()
    monkeypatch.setattr(vqgan, "VGG", (f"file://{lpips_files[0]}", digest))
    Perceptual("", lpips_files[1])
    monkeypatch.setattr(vqgan, "VGG", ("file:///nowhere/vgg16.pth", digest))
    Perceptual("", lpips_files[1])


def test_perceptual_loads_strictly(lpips_files, tmp_path, monkeypatch):
    vgg_path, lpips_path, vgg, lin = lpips_files
    stops = functools.partial(perceptual_run, monkeypatch, tmp_path)
    for broken in (
        {k: v for k, v in vgg.items() if k != "features.28.bias"},
        {k: v for k, v in vgg.items()} | {"features.24.weight": torch.zeros(512, 512, 3)},
    ):
        torch.save(broken, tmp_path / "v.pth")
        assert "v.pth" in stops(tmp_path / "v.pth", lpips_path)
    torch.save({k: v[:, :7] for k, v in lin.items()}, tmp_path / "l.pth")
    assert "l.pth" in stops(vgg_path, tmp_path / "l.pth")
    assert "missing.pth" in stops(lpips_path, vgg_path.with_name("missing.pth"))
    (tmp_path / "html.pth").write_bytes(b"<html>" * 100)
    assert "html.pth" in stops(tmp_path / "html.pth", lpips_path)


# --- discriminator -----------------------------------------------------------------------------


@pytest.mark.parametrize("size, count", [(256, 28_864_129), (512, 28_982_849), (1024, 29_012_513)])
def test_f46_discriminator_parameters(size, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Discriminator(size).parameters()) == count


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
def test_f44_discriminator_builds_at_every_size(size):
    with torch.device("meta"):
        assert Discriminator(size)(torch.rand(2, 3, size, size)).shape == (2,)
    with pytest.raises(ValueError, match="96"):
        Discriminator(96)


def test_f44_f45_the_discriminator_written_out():
    torch.manual_seed(0)
    critic, images = Discriminator(16, base=64, cap=16).double(), torch.rand(8, 3, 16, 16).double()
    for name, p in critic.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
            nn.init.normal_(p)
        elif p.numel() > 500:
            assert p.std().item() == pytest.approx(1, abs=0.1), "weights are drawn from N(0, 1)"
    edge = torch.tensor([1, 3, 3, 1]).double()
    low_pass = (edge[:, None] * edge / 64)[None, None]

    def conv(x, layer, padding=0, down=False):
        weight = layer.weight / math.sqrt(layer.weight[0].numel())  # equalised learning rate
        if down:
            each = low_pass.expand(x.shape[1], 1, 4, 4)
            x = F.conv2d(x, each, padding=1 + padding, groups=x.shape[1])
        return F.conv2d(x, weight, layer.bias, 1 + down, 0 if down else padding)

    def act(x):
        return torch.where(x > 0, x, 0.2 * x) * 2**0.5

    x = act(conv(2 * images - 1, critic.rgb))
    for first, second, skip in critic.blocks:
        y = act(conv(act(conv(x, first, 1)), second, 1, down=True))
        x = (y + conv(x, skip, down=True)) / 2**0.5
    stds = [(part.var(0, correction=0) + 1e-8).sqrt().mean() for part in x.split(4)]
    spread = torch.stack(stds).repeat_interleave(4).view(8, 1, 1, 1).expand(8, 1, 4, 4)
    x = act(conv(torch.cat([x, spread], 1), critic.conv, 1))
    scores = conv(act(conv(x, critic.dense)), critic.score)
    assert x.shape == (8, 16, 4, 4) and torch.allclose(critic(images), scores.flatten())


def test_f45_minibatch_stddev_sees_groups_of_four():
    torch.manual_seed(0)
    discriminator = Discriminator(16, cap=16)
    images = torch.rand(8, 3, 16, 16)
    scores = discriminator(images)
    halves = torch.cat([discriminator(half) for half in images.chunk(2)])
    assert torch.allclose(scores, halves, atol=1e-5), "two processes would not equal one"
    images[0] = 0
    changed = discriminator(images) != scores
    assert changed.tolist() == [True] * 4 + [False] * 4, "neighbours form a group"
    for batch in (1, 2, 3, 5, 6, 12):
        assert discriminator(torch.rand(batch, 3, 16, 16)).shape == (batch,)
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(images).isfinite().all()


# --- upsampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, count", [(2, 14.18e6), (4, 28.36e6)])
def test_f65_upsampler_parameters_without_the_gains_of_weight_norm(scale, count):
    with torch.device("meta"):
        named = Upsampler(scale).named_parameters()
    assert abs(sum(p.numel() for n, p in named if not n.endswith("original0")) - count) < 5e3


def test_f63_f64_the_upsampler_written_out():
    torch.manual_seed(0)
    upsampler, images = Upsampler(4, width=4, blocks=3), torch.rand(2, 3, 8, 8)
    for p in upsampler.parameters():
        nn.init.normal_(p, std=0.5)

    def conv(x, layer):  # weight norm: a length and a direction for each map
        length, direction = layer.parametrizations.weight.parameters()
        weight = length * direction / direction.square().sum((1, 2, 3), keepdim=True).sqrt()
        return F.conv2d(x, weight, layer.bias, padding=len(weight[0, 0]) // 2)

    x = images
    for stage in upsampler:
        assert stage.skip.kernel_size == (5, 5) and stage.wide[0].out_channels == 4 * 4
        x = 2 * x - 1
        y = conv(x, stage.head)
        for wide, narrow in zip(stage.wide, stage.narrow):
            y = y + conv(conv(y, wide).relu(), narrow)
        x = (F.pixel_shuffle(conv(y, stage.tail) + conv(x, stage.skip), 2) + 1) / 2
    assert len(upsampler) == 2 and torch.allclose(upsampler(images), x, atol=1e-4)


@pytest.mark.parametrize("scale", [2, 4])
def test_f64_upsampler_starts_as_nearest_neighbour_and_learns(scale):
    torch.manual_seed(0)
    upsampler, images = Upsampler(scale, width=8, blocks=2), torch.rand(2, 3, 8, 8)
    enlarged = F.interpolate(images, scale_factor=scale, mode="nearest")
    assert torch.allclose(upsampler(images), enlarged, atol=1e-5)
    target = F.interpolate(images, scale_factor=scale, mode="bicubic")
    optimizer, losses = torch.optim.Adam(upsampler.parameters(), 1e-3), []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16):
            enlarged = upsampler(images)
        assert enlarged.dtype == torch.float32, "under autocast, too"
        losses.append((enlarged - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(ValueError, match="3"):
        Upsampler(3)


# --- files -------------------------------------------------------------------------------------


def test_own_checkpoint_round_trip_and_clear_errors(tmp_path):
    model, images = tokenizer_and_images()
    path = tmp_path / "vqgan.pt"
    torch.save(
        {"config": dataclasses.asdict(model.config), "model": model.state_dict(), "step": 3}, path
    )
    loaded = vqgan.load(path)
    assert loaded.config == model.config and torch.equal(
        loaded.encode(images), model.encode(images)
    )
    assert not loaded.training
    whole = path.read_bytes()
    broken = tmp_path / "broken.pt"
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        broken.write_bytes(whole[:size])
        with pytest.raises(SystemExit) as error:
            vqgan.load(broken)
        assert "broken.pt is damaged" in str(error.value) and "\n" not in str(error.value)
        assert ".prev.pt" in str(error.value) and "--fresh" in str(error.value)
    config = dataclasses.asdict(model.config)
    for odd in (
        {"a": 1},
        [1],
        {"config": config | {"codes": 32}, "model": model.state_dict()},
        {"config": config | {"depth": 2}, "model": model.state_dict()},
        torch.zeros(2),
        {"config": config | {"heads": 3}, "model": model.state_dict()},
    ):
        torch.save(odd, broken)
        with pytest.raises(SystemExit) as error:
            vqgan.load(broken)
        assert "broken.pt" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="absent.pt does not exist"):
        vqgan.load(tmp_path / "absent.pt")
    for name, stage in (("decoder", "vqgan.py --stage decoder"), ("text", "prior.py --stage text"),
                        ("upsampler", "vqgan.py --stage upsampler"), ("prior", "prior.py"),
                        ("vqgan", "vqgan.py")):
        with pytest.raises(SystemExit, match=f"python train_{stage}$"):
            vqgan.load(tmp_path / f"gone/{name}.pt")
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=1)}, broken)
    with pytest.raises(SystemExit) as error:
        vqgan.load(broken)
    assert "state_dict" in str(error.value) and "\n" not in str(error.value)


def public_state(width, layers, heads, mlp, side, g, n):
    inner, state = 64 * heads, {}

    def weight(name, *shape):
        scale = 0.1 if len(shape) == 1 else 1 if "pos" in name else shape[-1] ** -0.5
        state[name] = scale * torch.randn(*shape, generator=g) + (name.endswith("norm.weight"))

    for i in range(layers):
        at = f"{side}.transformer.layers.{i}."
        for name, *shape in (
            ("0.norm.weight", width),
            ("0.norm.bias", width),
            ("0.fn.to_qkv.weight", 3 * inner, width),
            ("0.fn.to_out.weight", width, inner),
            ("0.fn.to_out.bias", width),
            ("1.norm.weight", width),
            ("1.norm.bias", width),
            ("1.fn.net.0.weight", mlp, width),
            ("1.fn.net.0.bias", mlp),
            ("1.fn.net.2.weight", width, mlp),
            ("1.fn.net.2.bias", width),
        ):
            weight(at + name, *shape)
    weight(f"{side}.transformer.norm.weight", width)
    weight(f"{side}.transformer.norm.bias", width)
    weight(f"{side}.{side[:2]}_pos_embedding", 1, n, width)
    return state


def public_transformer(x, s, side, layers, heads):
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"])

    for i in range(layers):
        at = f"{side}.transformer.layers.{i}."
        b, n, _ = x.shape
        q, k, v = (
            t.view(b, n, heads, 64).transpose(1, 2)
            for t in (norm(x, at + "0.norm") @ s[at + "0.fn.to_qkv.weight"].T).chunk(3, -1)
        )
        mixed = ((q @ k.transpose(-1, -2)) / 8).softmax(-1) @ v
        x = x + F.linear(
            mixed.transpose(1, 2).flatten(2),
            s[at + "0.fn.to_out.weight"],
            s[at + "0.fn.to_out.bias"],
        )
        h = F.linear(
            norm(x, at + "1.norm"), s[at + "1.fn.net.0.weight"], s[at + "1.fn.net.0.bias"]
        ).tanh()
        x = x + F.linear(h, s[at + "1.fn.net.2.weight"], s[at + "1.fn.net.2.bias"])
    return norm(x, f"{side}.transformer.norm")


@pytest.mark.parametrize("wrapped", [True, False])
def test_public_checkpoint_gives_the_public_models_tokens_and_pictures(tmp_path, wrapped):
    g = torch.Generator().manual_seed(0)
    s = public_state(48, 11, 2, 96, "encoder", g, 9) | public_state(80, 2, 1, 32, "decoder", g, 9)
    for name, *shape in (
        ("encoder.to_patch_embedding.0.weight", 48, 3, 8, 8),
        ("encoder.to_patch_embedding.0.bias", 48),
        ("decoder.to_pixel.1.weight", 80, 3, 8, 8),
        ("decoder.to_pixel.1.bias", 3),
        ("pre_quant.weight", 12, 48),
        ("pre_quant.bias", 12),
        ("post_quant.weight", 80, 12),
        ("post_quant.bias", 80),
        ("quantizer.embedding.weight", 50, 12),
        ("loss.perceptual_loss.lin0.model.1.weight", 1, 64, 1, 1),
    ):
        s[name] = (
            torch.randn(*shape, generator=g)
            / math.sqrt(math.prod(shape[1:]))
            / (10 if len(shape) == 1 else 1)
        )
    torch.save(
        {"state_dict": s, "epoch": 3, "global_step": 7} if wrapped else s, tmp_path / "vit.ckpt"
    )
    images = torch.rand(2, 3, 24, 24, generator=g)
    x = F.conv2d(
        images,
        s["encoder.to_patch_embedding.0.weight"],
        s["encoder.to_patch_embedding.0.bias"],
        stride=8,
    )
    x = x.flatten(2).transpose(1, 2) + s["encoder.en_pos_embedding"]
    x = public_transformer(x, s, "encoder", 11, 2)
    z = F.normalize(F.linear(x, s["pre_quant.weight"], s["pre_quant.bias"]), dim=-1)
    codes = F.normalize(s["quantizer.embedding.weight"], dim=-1)
    tokens = torch.cdist(z.flatten(0, 1), codes).argmin(-1).view(2, 9)
    x = (
        F.linear(codes[tokens], s["post_quant.weight"], s["post_quant.bias"])
        + s["decoder.de_pos_embedding"]
    )
    x = public_transformer(x, s, "decoder", 2, 1).transpose(1, 2).reshape(2, 80, 3, 3)
    pictures = F.conv_transpose2d(
        x, s["decoder.to_pixel.1.weight"], s["decoder.to_pixel.1.bias"], stride=8
    )
    model = vqgan.load(tmp_path / "vit.ckpt")
    assert model.config.sizes() == (48, 11, 2, 96) and model.config.sizes("decoder_") == (
        80,
        2,
        1,
        32,
    )
    assert torch.equal(model.encode(images), tokens) and len(tokens.unique()) > 3
    assert torch.allclose(model.decode(tokens), pictures, atol=1e-4)


# --- it learns ---------------------------------------------------------------------------------


@slow
def test_tokenizer_overfits_one_batch():
    torch.manual_seed(0)
    model = VQGAN(
        dataclasses.replace(vqgan.PRESETS["tiny"], image_size=32, codes=128, logit_laplace=True)
    )
    images = F.interpolate(torch.rand(8, 3, 4, 4), 32, mode="bilinear")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(80):
        maps, codebook_loss, _ = model(images, quantise=step >= 30, raw=True)
        if step == 30:
            model.init_codebook(model.latents(images.repeat(2, 1, 1, 1)).detach())
            continue
        loss = (vqgan.view(maps) - images).square().mean() + codebook_loss
        loss = loss + 0.1 * vqgan.logit_laplace_loss(maps, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert (
        vqgan.psnr(images, model(images)[0]).mean()
        > 20
        > vqgan.psnr(images, 0 * images + 0.5).mean()
    )


@slow
@pytest.mark.parametrize("stage", [vqgan.main, prior.walk_through])
def test_walk_throughs_show_shapes_and_the_papers_sizes(stage, capsys):
    stage()
    shown = " ".join(capsys.readouterr().out.split())
    lines = {vqgan.main: ("tokens (16, 64)", "decoded (16, 3, 64, 64)", "upsampled (16, 3, 128, 1",
                          "scores (16,)", "upsampler x4 28,37", "discriminator at 256 28,864,129"),
             prior.walk_through: ("encoded text (2, 9, 128)", "logits (2, 64, 1024)",
                                  "sampled (2, 64)", "350m 352,321,536 385,", "20b 20,401,094,656")}
    assert all(line in shown for line in lines[stage]), shown


# --- training stage 1 ----------------------------------------------------------------------------

SMALL_STAGE1 = "--image-size 32 --width 32 --mlp 64 --codes 64 --save-every 6 --device cpu "
SMALL_STAGE1 += "--dtype float32"
GAN_STAGE1 = "--adversarial 0.1 --channels 128"


def train_stage1(out, options, **how):
    run_script("train_vqgan.py", out, options.split(), **how)


def saved_stage1(out, name="vqgan"):
    return torch.load(Path(out, name + ".pt"), weights_only=True)


def log_stage1(out):
    """Rows of the log, without the seconds."""
    rows = log_of(out, "vqgan")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def stand_in(out, recipe, **options):
    """What a Run is to the functions of train_vqgan."""
    return argparse.Namespace(
        options=train_vqgan.Options(**options),
        recipe=recipe,
        path=out / "x.pt",
        device=torch.device("cpu"),
        start=0,
        world=1,
        rank=0,
    )


def test_f49_f60_f62_the_recipe_of_the_papers():
    recipe = train_vqgan.PAPER
    assert recipe.steps * recipe.batch == 128_000_000  # F50: image views
    assert (recipe.up_width, recipe.up_blocks, recipe.channels) == (128, 12, 16384)
    assert recipe.first == recipe.mosaic == 0 and recipe.rate(recipe.steps) == 5e-5, "ours are off"
    frozen, trained = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    optimizer = train_vqgan.make_optimizer(nn.Sequential(frozen, trained), recipe)
    [group] = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and group["params"] == [*trained.parameters()]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 1e-4)


def test_f57_f61_what_each_stage_trains_and_sees(tmp_path):
    """A new upsampler copies pixels: what it makes is what it was given."""
    paper, config = train_vqgan.PAPER, vqgan.PRESETS["tiny"]
    for laplace, maps in ((0.1, 6), (0.0, 3)):
        recipe = dataclasses.replace(paper, laplace=laplace)
        made, _, _ = train_vqgan.build(stand_in(tmp_path, recipe), config)
        assert made.decoder.project.out_features == maps * 64
    made, _ = tokenizer_and_images(logit_laplace=True)
    torch.save({"config": vars(made.config), "model": made.state_dict()}, tmp_path / "there.pt")
    options = {"preset": "tiny", "vqgan": str(tmp_path / "there.pt")}
    run = stand_in(tmp_path, paper, stage="decoder", **options)
    tuned, sizes, _ = train_vqgan.build(run, config)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in tuned.named_parameters() if name.startswith("decoder.")}
    images = torch.rand(2, 3, 128, 128)
    small = images[:, :, ::4, ::4]  # nearest
    assert torch.equal(tuned.encode(small), made.encode(small)) and not sizes["logit_laplace"]
    assert "leave out" in error(train_vqgan.build, run, dataclasses.replace(config, mlp=64))

    recipe = dataclasses.replace(paper, up_width=8, up_blocks=1)
    run = stand_in(tmp_path, recipe, stage="upsampler", scale=4, **options)
    net, _, tokenizer = train_vqgan.build(run, config)
    assert not any(p.requires_grad for p in tokenizer.parameters())
    large, loss, tokens = train_vqgan.predict(net, images, tokenizer)
    shown = made.decode(made.encode(small)).clamp(0, 1)
    nearest = shown.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert torch.allclose(large, nearest, atol=1e-5) and loss == 0
    assert torch.equal(tokens, made.encode(small))


def test_f33_f47_the_sum_of_losses_and_the_lazy_penalty():
    model, images = tokenizer_and_images(logit_laplace=True)
    critic, recipe = Discriminator(32, cap=16), train_vqgan.PAPER
    fakes, losses = train_vqgan.generator_step(model, critic, F.l1_loss, images, recipe)
    weights = {"codebook": 1, "l2": 1, "l1": 0}
    weights |= dict.fromkeys(("laplace", "perceptual", "adversarial"), 0.1)
    assert losses.keys() - {"loss"} == weights.keys() and not fakes.requires_grad
    total = sum(weight * losses[name] for name, weight in weights.items())
    assert losses["loss"].item() == pytest.approx(total.item())
    maps, codebook, _ = model(images, raw=True)
    expected = {
        "codebook": codebook,
        "l2": (fakes - images).square().mean(),
        "l1": (fakes - images).abs().mean(),
        "laplace": vqgan.logit_laplace_loss(maps, images),
        "perceptual": (fakes - images).abs().mean(),
        "adversarial": (1 + (-critic(fakes)).exp()).log().mean(),
    }
    assert {k: v.item() for k, v in expected.items()} == pytest.approx(
        {k: v.item() for k, v in losses.items() if k != "loss"}, rel=1e-4
    )
    losses["loss"].backward()
    assert all(p.grad is None for p in critic.parameters()), "it only passes gradients on"
    assert model.encoder.embed.weight.grad.norm() > 0
    first, second, *others = (
        train_vqgan.discriminator_step(critic, images, fakes, recipe, step)["critic"].item()
        for step in range(1, 18)
    )
    images.requires_grad_()
    penalty = vqgan.r1_penalty(critic(images), images, gamma=10.0, every=16).item()
    assert first - second == pytest.approx(penalty, rel=1e-3)
    assert others == [second] * 14 + [first], "every 16th step"
    real, fake = critic(images), critic(fakes)
    assert second == pytest.approx(((1 + (-real).exp()) * (1 + fake.exp())).log().mean().item())
    half = dataclasses.replace(recipe, r1=5.0)
    lower = train_vqgan.discriminator_step(critic, images.detach(), fakes, half, 1)
    assert lower["critic"].item() - second == pytest.approx(penalty / 2, rel=1e-2)
    assert lower["real"] == real.mean() and lower["fake"] == fake.mean()
    lower["critic"].backward()
    assert all(p.grad is not None for p in critic.parameters())


def test_patches_that_repeat_count_once_and_each_gets_a_code():
    """Without positions a patch has one latent wherever it stands: fewer patches than codes lose
    nothing. With them its code is the mean of several places."""
    model, images = tokenizer_and_images()
    few = torch.zeros(2, 3, 32, 32)
    few[0, :, 8:16, :8] = 1
    pool = train_vqgan.distinct_patches(few, model.config)
    assert pool.shape == (16, 192) and {*pool.mean(1).tolist()} == {0, 1}
    pool = train_vqgan.distinct_patches(torch.cat([images, images[:2]]), model.config)
    assert len(pool) == 4 * 16

    def loss_on_mosaics(**how):
        train_vqgan.start_codebook(model, pool, torch.Generator().manual_seed(0), **how)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).view(4, 16)
        return model(vqgan.unpatchify(pool[order], 8))[1].item()

    nn.init.zeros_(model.encoder.positions)
    assert loss_on_mosaics() < 1e-6
    nn.init.normal_(model.encoder.positions, std=0.3)
    assert loss_on_mosaics() < 0.8 * loss_on_mosaics(surroundings=1)


def test_mosaics_then_k_means_then_some_mosaics_on_any_number_of_processes(tmp_path):
    """The data is white, mosaics are of dark patches."""
    recipe = dataclasses.replace(
        train_vqgan.RECIPES["tiny"], steps=6, batch=4, autoencoder=0.5, mosaic=0.5
    )
    white = torch.full((4, 3, 32, 32), 255, dtype=torch.uint8)
    dark = torch.linspace(0, 0.5, 100)[:, None].expand(100, 192)

    def trained_on(recipe=recipe, **where):
        """-> (step, picture) -> its mean, and the codebook at each step."""
        torch.manual_seed(0)
        model, run = VQGAN(TINY), stand_in(tmp_path, recipe)
        vars(run).update(where)
        stream = [(white.chunk(run.world)[run.rank], None)] * (recipe.steps - run.start)
        pictures = train_vqgan.training_pictures(stream, model, dark[:96], run)
        pairs = [(x.mean((1, 2, 3)), model.fingerprint()) for (x,) in pictures]
        return torch.stack([x for x, _ in pairs]), [y for _, y in pairs]

    pictures, books = trained_on()
    assert (pictures[:3] < 0.6).all() and len(pictures.unique()) == 3 * 4 + 3 * 2 + 1
    assert (pictures[3:, :2] < 0.6).all() and (pictures[3:, 2:] == 1).all()
    assert books[0] == books[2] != books[3] == books[5], "k-means is due after half the steps"
    assert torch.equal(trained_on(start=4)[0], pictures[4:]), "a resume shows what was due"
    parts = [trained_on(world=2, rank=rank)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(parts, 1), pictures), "two processes show what one shows"
    off = dataclasses.replace(recipe, mosaic=0.0)
    assert (trained_on(off)[0] == 1).all()


def test_f32_f42_health_is_that_of_the_reconstructions(tmp_path):
    model, _ = tokenizer_and_images()
    images, captions = next(data.batches(data.Scenes("seen", 32), 40, 0, 0, 1))
    images = images / 255
    for quantise in (True, False):
        how = captions, 64, tmp_path / "x.png", None, quantise
        health = train_vqgan.evaluate(model, images, *how)
        made, _, tokens = model(images, quantise)
        error = (made.clamp(0, 1) - images).double().square().mean((1, 2, 3))
        assert health["psnr"] == pytest.approx(-10 * error.log10().mean().item(), rel=1e-4)
        assert health["usage"] == len({*tokens.flatten().tolist()}) / 64
        assert health["right"] == 0, "grey shows no scene"
    assert Image.open(tmp_path / "x.png").size == (8 * 132, 2 * 150)


@slow
def test_f4_f59_what_was_trained_on_other_tokens_is_not_continued(
    tmp_path, monkeypatch, restore_signals
):
    """Nor is a tokenizer whose codebook would start at another step."""
    opened, open_data = [], data.open_data
    monkeypatch.setattr(data, "open_data", lambda *a: opened.append(a[2:5]) or open_data(*a))
    for i in range(8):
        picture(tmp_path / f"pictures/dog/{i}.png", 30 * i)
    pictures = f"--data {tmp_path}/pictures --preset tiny --batch 2 --device cpu --out {tmp_path}"
    small = f"{pictures} --width 32 --heads 2 --mlp 64".split()
    first = [*small, *"--image-size 32 --codes 64 --autoencoder 0 --mosaic 0".split()]
    main_of(train_vqgan, [*first, "--steps", 1], monkeypatch)
    with pytest.raises(SystemExit, match="configuration .autoencoder_steps 0 there, 1 here"):
        main_of(train_vqgan, [*first, "--steps", 2, "--autoencoder", 0.5], monkeypatch)

    small += "--encoder-layers 1 --decoder-layers 1".split()
    later = [(train_prior, [*small, "--stage", stage]) for stage in ("prior", "text")]
    more = f"{pictures} --mosaic 0 --up-width 4 --up-blocks 1".split()
    later += [(train_vqgan, [*more, "--stage", stage]) for stage in ("decoder", "upsampler")]
    for script, options in later:
        main_of(script, [*options, "--steps", 1], monkeypatch)
    saved = saved_stage1(tmp_path)
    saved["model"]["codebook"] += 1
    torch.save(saved, tmp_path / "vqgan.pt")
    script, options = later.pop(1)  # --stage text sees no tokens
    main_of(script, [*options, "--steps", 2], monkeypatch)
    for script, options in later:
        with pytest.raises(SystemExit, match="configuration .tokenizer_fingerprint"):
            main_of(script, [*options, "--steps", 2], monkeypatch)
    held, shown = (32, data.centre_crop, "seen"), (32, data.tokenizer_crop, "train")
    assert opened[:2] == [shown, held] and (32, data.prior_crop, "train") in opened
    assert (64, data.tokenizer_crop, "train") in opened, "the upsampler's are twice as large"


@slow
def test_k_means_starts_the_codebook_and_the_upsampler_learns_from_it(tmp_path):
    train_stage1(tmp_path, f"{SMALL_STAGE1} --batch 4 --steps 6 --log-every 1")
    losses = column(log_of(tmp_path, "vqgan"), "codebook")
    assert losses[:3] == [0, 0, 0] and all(0 < x < 0.6 for x in losses[3:]), "1.6 without k-means"
    train_stage1(tmp_path, "--stage upsampler --steps 2 --batch 2 --device cpu")
    assert saved_stage1(tmp_path, "upsampler")["config"] == {"scale": 2, "width": 24, "blocks": 3}
    model = vqgan.load(tmp_path / "vqgan.pt")
    held = next(data.batches(data.Scenes("seen", 32), 256, 0, 0, 1))[0] / 255
    decibels = vqgan.psnr(held, model.decode(model.encode(held))).mean().item()
    assert column(log_of(tmp_path, "vqgan"), "psnr")[-1] == pytest.approx(decibels, abs=0.01)
    assert column(log_of(tmp_path, "upsampler"), "psnr")[-1] > 5


@slow
def test_stage_1_killed_and_continued_is_uninterrupted_bit_for_bit(tmp_path):
    """kill -9 after a save in the autoencoder half: weights, both optimizers, log. Then the decoder
    stage on the same tokenizer (F59): it leaves the token ids alone."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = f"{SMALL_STAGE1} {GAN_STAGE1} --batch 4 --steps 12"
    train_stage1(whole, options)
    until = (parts / "vqgan.pt").exists
    train_stage1(parts, options, until=until, number=signal.SIGKILL)
    assert saved_stage1(parts)["step"] < 12, "too late to interrupt"
    train_stage1(parts, options)
    same(saved_stage1(whole), saved_stage1(parts))
    assert log_stage1(whole) == log_stage1(parts)
    assert {"loss", "critic", "real", "fake", "psnr"} <= set(log_stage1(whole)[0])

    train_stage1(whole, "--stage decoder --steps 3 --batch 2 --device cpu")
    before, after = (vqgan.load(whole / name) for name in ("vqgan.pt", "decoder.pt"))
    images = next(data.batches(data.Scenes(size=32), 8, 0, 0, 1))[0] / 255
    assert torch.equal(before.encode(images), after.encode(images))
    assert after.config.sizes("decoder_") == (192, 4, 6, 768)
    moved = saved_stage1(whole, "decoder")["model"]["decoder.project.bias"]
    assert not torch.equal(moved, torch.full_like(moved, 0.5)), "the decoder did not train"


@slow
def test_stage_1_two_processes_equal_one_with_the_gan(tmp_path):
    """On the same global batch, to rounding. The discriminator compares groups of 4 neighbours:
    each process holds whole groups."""
    options = f"{SMALL_STAGE1} {GAN_STAGE1} --batch 8 --steps 6 --log-every 1 --lr 1e-4"
    options += " --autoencoder 0"
    train_stage1(tmp_path / "one", options)
    train_stage1(tmp_path / "two", options, world=2)
    one, two = (log_of(tmp_path / name, "vqgan") for name in ("one", "two"))
    for name in ("l2", "critic", "real", "fake"):
        assert column(one, name) == pytest.approx(column(two, name), abs=1e-4), name
    one, two = (saved_stage1(tmp_path / name) for name in ("one", "two"))
    for part in ("model", "discriminator"):
        for key, value in one[part].items():
            assert torch.allclose(value, two[part][key], atol=5e-4), key


# --- attention -----------------------------------------------------------------------------------
# The kernels, in Triton's interpreter, and torch's own path, against float64.


def plain_attention(q, k, v, lengths, causal, kernel, grid):
    """Plain float64 attention; the mask is built from the set of offsets, not from `allowed`."""
    q, k, v = q.double(), k.double(), v.double()
    n, m = q.shape[2], k.shape[2]
    difference = torch.arange(n)[:, None] - torch.arange(m)
    see = torch.ones(n, m, dtype=torch.bool)
    if causal:
        see = difference >= 0
    if kernel:
        half = kernel // 2
        offsets = {grid * r - c for r in range(half + 1) for c in range(-half, half + 1)}
        see = torch.isin(difference, torch.tensor([o for o in offsets if o >= 0]))
    see = see.expand(len(q), 1, n, m)
    if lengths is not None:
        see = see & (torch.arange(m) < lengths.view(-1, 1, 1, 1))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~see, -1e300)
    return (scores.softmax(-1) * see) @ v


CASES = [  # Nq, Nk, d, causal, kernel, grid, padded, dtype
    (37, 37, 32, True, 0, 0, False, torch.float32),
    (33, 50, 64, False, 0, 0, True, torch.float32),
    (70, 41, 32, True, 0, 0, True, torch.float32),
    (50, 70, 128, False, 0, 0, False, torch.float32),
    (16, 16, 32, True, 3, 4, False, torch.float32),
    (150, 150, 32, True, 11, 8, False, torch.float32),
    (129, 129, 64, True, 5, 16, True, torch.float32),
    (65, 65, 64, True, 3, 7, False, torch.float16),
    (67, 130, 64, False, 0, 0, True, torch.bfloat16),
    (1, 1, 128, True, 0, 0, False, torch.bfloat16),
    (60, 20, 32, True, 3, 4, False, torch.float32),
]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_its_three_gradients(case, fused):
    n, m, d, causal, kernel, grid, padded, dtype = case
    B, H = (3, 1) if padded else (1, 2)

    def draw(rows):
        return torch.randn(B, rows, H, d).transpose(1, 2).to(dtype)

    q, k, v = (draw(rows).requires_grad_() for rows in (n, m, m))
    lengths = torch.tensor([m + 9, torch.randint(1, m, ()), 0]) if padded else None
    out = prior.attention(q, k, v, causal, kernel, grid, lengths, fused=fused)
    truth = plain_attention(q, k, v, lengths, causal, kernel, grid)
    weight = draw(n)
    got = (out, *torch.autograd.grad(out, (q, k, v), weight))
    want = (truth, *torch.autograd.grad(truth, (q, k, v), weight.double()))
    limit = {torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    for name, x, y in zip(("output", "dq", "dk", "dv"), got, want):
        assert x.isfinite().all(), f"{name} is not finite"
        error = (x.double() - y).abs().max() / y.abs().max().clamp(min=1e-3)
        assert error < limit, f"{name} is off by {error:.1e}"
    if padded:
        assert out[2].eq(0).all(), "a row with nothing to attend to must give zeros"


@pytest.mark.parametrize(
    "n, kernel, grid", [(64, 11, 8), (100, 3, 16), (256, 11, 16), (700, 11, 32)]
)
def test_block_local_equals_dense(n, kernel, grid):
    q, k, v = (torch.randn(2, 2, n, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = prior.attention(q, k, v, kernel=kernel, grid=grid)
    dense = prior.attention(q, k, v, kernel=kernel, grid=grid, lengths=torch.tensor([n, n]))
    weight = torch.randn_like(out)
    torch.testing.assert_close(out, dense)
    for x, y in zip(*(torch.autograd.grad(o, (q, k, v), weight) for o in (out, dense))):
        torch.testing.assert_close(x, y)


def test_f79_f80_anchors_of_the_conv_shaped_mask():
    assert prior.conv_offsets(3, 4) == [0, 1, 3, 4, 5]
    offsets = prior.conv_offsets(11, 32)
    assert len(offsets) == 61 and offsets[-1] == 165
    i = torch.arange(1024)
    seen = prior.allowed(i[:, None], i, 1024, True, 11, 32).sum(1)
    assert seen.sum() == 57169 and (seen == 61).sum() == 859
    assert [int(seen[r]) for r in (0, 1, 32)] == [1, 2, 12]


@pytest.mark.parametrize(
    "n, kernel, grid, own, step",
    [
        (1024, 11, 32, 64, 64),
        (1024, 11, 32, 64, 32),
        (4096, 11, 64, 64, 64),
        (300, 3, 16, 32, 32),
        (200, 11, 8, 32, 32),
    ],
)
def test_tiles_without_an_allowed_pair_are_skipped(n, kernel, grid, own, step):
    i = torch.arange(n)
    see = prior.allowed(i[:, None], i, n, True, kernel, grid)
    reach = (grid + 1) * (kernel // 2)
    for pairs, behind, ahead in ((see, reach, 0), (see.T, 0, reach)):  # forward and dq, dk and dv
        visited = needed = 0
        for start in range(0, n, own):
            first, last = prior.tile_range(start, own, step, n, behind, ahead)
            for tile in range(0, n, step):
                wanted = bool(pairs[start : start + own, tile : tile + step].any())
                walked = tile in range(first, last, step)
                assert walked or not wanted, "a tile with an allowed pair is skipped"
                visited, needed = visited + walked, needed + wanted
        assert visited == needed, "a tile without an allowed pair is walked"
    if n == 1024:
        assert visited * own * step < 0.45 * n * (n + own) / 2, "the sparse mask saves no work"


@pytest.mark.parametrize("kernel", [0, 3])
def test_ring_of_positions_equals_the_whole(kernel):
    n, grid = 40, 6
    ring = 8 if kernel else n  # the largest offset of 3 x 3 on 6 columns is 7
    q, k, v = (torch.randn(2, 2, n, 16, dtype=torch.float64) for _ in range(3))
    whole = prior.attention(q, k, v, True, kernel, grid)
    keys, values = torch.zeros(2, 2, 2, ring, 16, dtype=torch.float64)
    positions = torch.full((ring,), -1)
    for p in range(n):
        keys[:, :, p % ring], values[:, :, p % ring] = k[:, :, p], v[:, :, p]
        positions[p % ring] = p
        see = prior.allowed(p, positions, n, True, kernel, grid)[None]
        mask = torch.where(see, 0.0, -math.inf)
        heads = [x.flatten(0, 1) for x in (q[:, :, p : p + 1], keys, values)]
        one = prior.attention(*heads, mask=mask.double())
        torch.testing.assert_close(one, whole[:, :, p : p + 1].flatten(0, 1))


def test_the_door_takes_the_kernels_where_they_can_run():
    def hand_written(d=32, dtype=torch.float32, **how):
        q = torch.zeros(1, 1, 4, d, dtype=dtype, requires_grad=True)
        return type(prior.attention(q, q, q, **how).grad_fn).__name__ == "FusedBackward"

    assert all(hand_written(d) for d in (32, 64, 128)) and hand_written(dtype=torch.bfloat16)
    assert not hand_written(48) and not hand_written(dtype=torch.float64)
    assert hand_written(kernel=3, grid=2, fused=True) and not hand_written(fused=False)


def test_a_sparse_mask_needs_an_odd_kernel_and_a_grid():
    q = torch.randn(1, 1, 20, 8)
    for kernel, grid in ((4, 5), (3, 0)):
        with pytest.raises(ValueError, match=f"{kernel} and {grid}"):
            prior.attention(q, q, q, kernel=kernel, grid=grid)


# --- the prior -----------------------------------------------------------------------------------

SMALL = PriorConfig(
    text_vocab=50,
    text_length=12,
    codes=24,
    grid=4,
    width=32,
    heads=2,
    mlp=64,
    encoder_layers=2,
    decoder_layers=2,
    dropout=0.0,
    kernel=3,
)
OFFSETS = [0, 1, 3, 4, 5]  # 3 x 3 on 4 x 4


def small_prior(**changes):
    """A prior whose head is not zero any more, texts (4, 12) of lengths 12, 5, 1, 0 and tokens."""
    torch.manual_seed(0)
    model = Parti(dataclasses.replace(SMALL, **changes)).eval()
    nn.init.normal_(model.head.weight, std=0.3)
    text = torch.randint(4, 50, (4, 12))
    for row, length in zip(text, (12, 5, 1, 0)):
        row[length:] = 0
    return model, text, torch.randint(model.config.codes, (4, model.config.tokens))


@pytest.mark.parametrize(
    "name, weights",
    [("350m", 352_321_536), ("750m", 754_974_720), ("3b", 3_019_898_880), ("20b", 20_401_094_656)],
)
def test_f67_block_weights_of_table_1_on_the_meta_device(name, weights):
    with torch.device("meta"):
        model = Parti(prior.PRESETS[name])
    blocks = [*model.encoder.blocks, *model.blocks]
    assert sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2) == weights
    config = model.config
    assert config.width // config.heads == 64 and config.mlp == 4 * config.width  # F68
    assert (config.tokens, config.codes, config.text_length, config.text_vocab) == (
        1024,
        8192,
        128,
        16_000,
    )
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.encoder.norm, nn.LayerNorm)


@pytest.mark.parametrize("width, layers", [(64, (2, 2)), (128, (3, 4))])
def test_memory_is_what_autograd_and_adafactor_keep(width, layers):
    config = prior.PriorConfig(100, 32, 256, 8, width, width // 32, 4 * width, *layers, kernel=0)
    model = Parti(config)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    for batch in (1, 3):
        kept, alive, need = {}, [], prior.memory(config, batch)

        def pack(x):
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            alive.append(x)  # or its memory serves twice
            return x

        tokens = torch.zeros(batch, config.tokens).long()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(torch.full((batch, 32), 5), tokens)
                F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        saved = sum(size for storage, size in kept.items() if storage not in weights)
        assert need["activations"] == pytest.approx(saved, rel=0.1), "a block keeps something else"
    optimizer = prior.Adafactor(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values()]
    assert need["optimizer"] == sum(x.nbytes for x in moments if torch.is_tensor(x))
    assert need["weights"] == need["gradients"] == sum(p.nbytes for p in model.parameters())
    shared = prior.memory(config, batch, shards=2)
    halves = {name: size // 2 for name, size in need.items()}
    assert shared == halves | {"activations": need["activations"]}


@pytest.mark.parametrize(
    "changes, words",
    [({"width": 100, "heads": 3}, ("100", "3")), ({"kernel": 4}, ("kernel 4", "odd"))],
)
def test_sizes_of_a_prior_that_do_not_fit_are_one_line(changes, words):
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(SMALL, **changes)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_f71_the_first_loss_is_ln_k():
    torch.manual_seed(0)
    logits = Parti(SMALL)(torch.ones(2, 12).long(), torch.randint(24, (2, 16)))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(24, (32,)))
    assert loss.item() == pytest.approx(math.log(24), abs=1e-6)
    paper = Parti(dataclasses.replace(SMALL, codes=prior.PRESETS["350m"].codes))
    loss = -paper(torch.ones(1, 12).long(), torch.zeros(1, 16).long()).log_softmax(-1).mean()
    assert loss.item() == pytest.approx(9.011, abs=1e-3)


@torch.no_grad()
def test_f69_f72_the_encoder_and_the_decoder_written_out():
    model, text, tokens = small_prior()
    (w, linear, norm), lengths = written_out(model), torch.tensor([12, 5, 1, 1])

    def attend(x, context, name, *rule):
        parts = linear(x, name + ".q"), *linear(context, name + ".kv").chunk(2, -1)
        heads = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in parts)
        return linear(plain_attention(*heads, *rule).transpose(1, 2).flatten(2), name + ".out")

    def block(x, name, *rule):
        h = norm(x, name + ".norm1")
        x = x + attend(h, h, name + ".attention", *rule)
        if not name.startswith("encoder"):
            h = norm(x, name + ".norm2")
            x = x + attend(h, words, name + ".cross", lengths, False, 0, 0)
        return x + linear(F.gelu(linear(norm(x, name + ".norm3"), name + ".up")), name + ".down")

    words = w["encoder.embed.weight"][text] + w["encoder.positions"]
    for i in range(2):
        words = block(words, f"encoder.blocks.{i}", lengths, False, 0, 0)
    words = norm(words, "encoder.norm")
    x = torch.cat([w["start"].expand(4, 1, 32), w["embed.weight"][tokens[:, :-1]]], 1)
    x = x + torch.stack([w["rows"][i // 4, 0] + w["columns"][0, i % 4] for i in range(16)])
    for i in range(2):
        x = block(x, f"blocks.{i}", None, True, 3, 4)
    logits = linear(norm(x, "norm"), "head")
    assert torch.allclose(model(text, tokens).double(), logits, atol=1e-3)


def test_f73_dropout_of_what_comes_in_of_residuals_and_of_activations_in_training_alone(tmp_path):
    model, text, tokens = small_prior(dropout=0.1)
    shares, before = [], model(text, tokens)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(
                lambda _, x, y: shares.append((len(y[0, 0]), (y == 0).float().mean().item())))
    logits = model.train()(text, tokens)
    assert [width for width, _ in shares] == [32] + 2 * [32, 64, 32] + [32] + 2 * [32, 32, 64, 32]
    assert all(0.05 < share < 0.15 for _, share in shares)
    assert not torch.allclose(logits, before, atol=1e-3)
    config = dataclasses.asdict(model.config)
    torch.save({"config": config, "model": model.state_dict()}, tmp_path / "prior.pt")
    assert torch.equal(prior.load(tmp_path / "prior.pt")(text, tokens), before)


def test_initial_values_keep_the_variance():
    """Tables are N(0, 1); maps keep unit scale; what L blocks of a stack add is 1 / sqrt(2 L)."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, width=128, grid=16, encoder_layers=1, decoder_layers=4)
    model, dual = Parti(config), DualEncoder(config, 64).image
    for scale, *parameters in (
        (1, model.embed.weight, model.encoder.embed.weight, model.encoder.positions, model.start),
        (1, model.rows, model.columns, dual.positions),
        (128**-0.5, model.blocks[3].attention.kv.weight, model.blocks[0].cross.out.weight),
        (192**-0.5, dual.embed.weight),
        ((128 * 2 * 1) ** -0.5, model.encoder.blocks[0].attention.out.weight),
        ((128 * 2 * 4) ** -0.5, model.blocks[0].attention.out.weight),
        ((64 * 2 * 4) ** -0.5, model.blocks[0].down.weight),
    ):
        for p in parameters:
            assert p.std().item() == pytest.approx(scale, rel=0.2), p.shape


@pytest.mark.parametrize("kernel", [0, 3])
def test_a_token_changes_no_logit_before_it(kernel):
    model, text, tokens = small_prior(kernel=kernel)
    before = model(text, tokens)
    for j in (0, 6, 15):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 1) % 24
        changed = (model(text, other) != before).any(-1).any(0)
        assert not changed[: j + 1].any(), "a code is predicted from itself or from later ones"
        assert j == 15 or changed[j + 1]


def test_f79_f82_one_sparse_layer_passes_a_token_on_to_the_offsets_alone():
    model, text, tokens = small_prior(decoder_layers=1)
    before = model(text, tokens)
    for j in (0, 4, 9):
        other = tokens.clone()
        other[:, j] = (other[:, j] + 1) % 24
        changed = (model(text, other) != before).any(-1).any(0).nonzero().flatten().tolist()
        # The input of position j + 1 is token j: state i holds token i - 1 and predicts token i.
        assert changed == [j + 1 + o for o in OFFSETS if j + 1 + o < 16]


def test_text_reaches_every_position_and_its_padding_none():
    model, text, tokens = small_prior()
    before = model(text, tokens)
    longer = F.pad(text[:, :5], (0, 7))
    assert torch.allclose(model(longer, tokens)[1:], model(text[:, :5], tokens)[1:], atol=1e-5)
    assert not torch.allclose(before[0], model(longer, tokens)[0], atol=1e-3)
    text[1, 4] = 7
    assert (model(text, tokens)[1] != before[1]).any(-1).all()


def test_a_text_of_padding_alone_gives_no_nan_and_is_the_dropped_caption():
    model, text, tokens = small_prior()
    logits = model(torch.zeros_like(text), tokens)
    logits.square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    words = data.Text(data.train_tokens(["a red circle", "a blue square"]), 12)
    assert torch.equal(words([""]), torch.zeros(1, 12).long())
    assert torch.allclose(logits[3], model(text, tokens)[3], atol=1e-5)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kernel", [0, 3])
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones_at_every_position(kernel, guided, short):
    with torch.autocast("cpu", torch.bfloat16, enabled=short):
        cached_is_uncached(kernel, guided, 5e-2 if short else 1e-4)


def cached_is_uncached(kernel, guided, atol):
    model, text, tokens = small_prior(kernel=kernel)
    step, graph = (prior.CachedDecoder(model, text, guided) for _ in range(2))
    assert step.size == (6 if kernel else 16), "the ring holds what the mask can reach, F79"
    assert step.layers[0][3].dtype == torch.float32, "a CPU keeps its cache in float32"
    if guided:  # F108: the second stream has no text
        text, tokens = torch.cat([text, torch.zeros_like(text)]), tokens.repeat(2, 1)
    whole = model(text, tokens)
    for i in range(16):
        before = tokens[:, i - 1] if i else torch.full((len(text),), model.config.codes)
        logits = step(i, before)
        assert torch.allclose(logits, whole[:, i], atol=atol), f"position {i} saw something else"
        # What a CUDA graph holds: the position is a tensor, and all slots are read.
        with torch.autocast("cpu", enabled=False):
            logits = graph.step(torch.tensor([i]), before)
        assert torch.allclose(logits, whole[:, i], atol=atol), f"slots at {i} are not yet filled"


@pytest.mark.parametrize("n_in", [48, 1024])
@pytest.mark.parametrize("short, rows", [(False, 2), (True, 2), (True, 17)])
def test_few_rows_are_multiplied_alike(short, rows, n_in):
    weight, x = torch.randn(24, n_in), torch.randn(rows, n_in) * n_in**-0.5
    y = prior.multiplier(weight, torch.bfloat16 if short else torch.float32, rows)(x)
    torch.testing.assert_close(y, x @ weight.T, atol=0.03 if short else 1e-5, rtol=0)


@torch.no_grad()
def test_logits_are_float32_under_autocast():
    model, text, tokens = small_prior()
    with torch.autocast("cpu", torch.bfloat16):
        logits, sampled = model(text, tokens), model.generate(text, guidance=2.0)
    assert logits.dtype == torch.float32 and sampled.shape == (4, 16)  # F102
    assert (logits - model(text, tokens)).abs().max() < 0.3


# --- sampling ------------------------------------------------------------------------------------


def test_f107_guidance_1_is_conditional_and_0_unconditional():
    with_text, without = torch.randn(2, 4, 24)
    assert torch.allclose(prior.guide(with_text, without, 1.0), with_text, atol=1e-6)
    assert torch.equal(prior.guide(with_text, without, 0.0), without)
    assert torch.allclose(
        prior.guide(with_text, without, 1.2), 1.2 * with_text - 0.2 * without, atol=1e-6
    )
    model, text, _ = small_prior()

    def drawn(text, scale):
        return model.generate(text, scale, generator=torch.Generator().manual_seed(5))

    nothing = torch.zeros_like(text)
    assert torch.equal(drawn(text, 0.0), drawn(nothing, 1.0))
    assert torch.equal(drawn(nothing, 3.0), drawn(nothing, 1.0)), "no text: nothing to amplify"
    assert torch.equal(drawn(text, 1.0), drawn(text, 1.0 + 1e-9))  # one stream or two, F109
    assert not torch.equal(drawn(text, 1.0), drawn(text, 4.0))


@torch.no_grad()
def test_sampling_follows_the_logits():
    model, text, _ = small_prior()
    likeliest = model.generate(text, top_k=1)
    assert torch.equal(model(text, likeliest).argmax(-1), likeliest)
    assert torch.equal(model.generate(text, temperature=0), likeliest)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    a, b, c = (model.generate(text, generator=seed) for seed in seeds)
    assert torch.equal(a, b) and not torch.equal(a, c)
    counts = prior.draw(torch.tensor([[0.5, 0.3, 0.2]]).log().expand(20_000, 3)).bincount() / 20_000
    assert counts.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


@torch.no_grad()
def test_f107_f110_sampling_guides_then_cools_then_truncates_then_draws():
    model, text, _ = small_prior()
    seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
    tokens, nothing = torch.zeros(4, 16).long(), torch.zeros_like(text)
    for i in range(16):  # no cache, and the two streams apart
        with_text, without = model(text, tokens)[:, i], model(nothing, tokens)[:, i]
        p = ((0.5 * with_text + 0.5 * without) / 3).softmax(-1)
        p = torch.where(p < p.topk(12).values[:, -1:], 0, p)
        p, order = (p / p.sum(-1, keepdim=True)).sort(descending=True)
        p = torch.where(p.cumsum(-1) - p < 0.8, p, 0).gather(1, order.argsort(1))
        tokens[:, i] = torch.multinomial(p, 1, generator=seeds[0])[:, 0]
    drawn = model.generate(text, 0.5, 3.0, top_k=12, top_p=0.8, generator=seeds[1])
    assert torch.equal(drawn, tokens) and len(tokens.unique()) > 8


def test_truncation_keeps_the_likeliest():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]).log()

    def kept(**how):
        return (prior.truncate(logits, **how) > -math.inf).int().tolist()

    assert torch.equal(prior.truncate(logits), logits)
    assert kept(top_k=2)[0] == [0, 1, 0, 1] and kept(top_k=9) == [[1] * 4] * 2
    assert kept(top_p=0.69) == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert kept(top_p=0.71)[0] == [0, 1, 1, 1] and kept(top_p=0.0) == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert kept(top_k=3, top_p=0.5)[0] == [0, 1, 0, 1]


# --- text and pictures in one space --------------------------------------------------------------


def test_f86_hides_15_percent_of_the_words_80_10_10():
    torch.manual_seed(0)
    text = torch.full((400, 50), 9)
    text[:, 40:] = 0
    hidden, chosen = prior.hide(text, 1000, torch.rand(3, 400, 50))
    assert not chosen[:, 40:].any() and torch.equal(hidden[~chosen], text[~chosen])
    assert chosen[:, :40].float().mean().item() == pytest.approx(0.15, abs=0.01)
    became = hidden[chosen]
    shares = [(became == value).float().mean().item() for value in (prior.MASK, 9)]
    assert shares == pytest.approx([0.8, 0.1], abs=0.03)
    few = prior.hide(text, 8, torch.rand(3, 400, 50))[0].unique().tolist()
    assert few == [0, 1, 4, 5, 6, 7, 9], "padding or a mark in the place of a word"
    assert 900 < became.max() < 1000, "any piece"
    pieces = data.Text(data.train_tokens(["a red circle"])).pieces
    assert pieces.unk_id() == prior.MASK and prior.MASK not in pieces.encode("\u8303 zebra!")


def test_f87_contrastive_loss_in_closed_form():
    text, images = (F.normalize(torch.randn(6, 8).double(), dim=-1) for _ in range(2))
    e = (7.0 * text @ images.T).exp()
    right = e.diagonal()
    expected = -((right / e.sum(1)).log() + (right / e.sum(0)).log()).mean() / 2
    assert torch.allclose(prior.contrastive_loss(text, images, 7.0), expected)
    one = F.normalize(torch.ones(5, 8), dim=-1)  # all alike: a guess among five
    assert prior.contrastive_loss(one, one, 3.0).item() == pytest.approx(math.log(5))
    assert prior.contrastive_loss(torch.eye(5), torch.eye(5), 100.0) < 1e-6


def test_f84_the_text_tower_is_the_encoder_of_the_prior():
    torch.manual_seed(0)
    dual, (model, text, _) = DualEncoder(SMALL, 32).eval(), small_prior()
    model.encoder.load_state_dict(dual.encoder.state_dict())
    assert torch.equal(model.encoder(text)[0], dual.encoder(text)[0])
    images = torch.rand(4, 3, 32, 32)
    hidden = torch.where(text == 0, 0, prior.MASK)
    texts, pictures, scale, words = dual(text, images, hidden)
    assert texts.shape == pictures.shape == (4, 32) and words.shape == (4, 12, 50)
    mean = torch.stack([dual.encoder(text)[0][i, :n].mean(0) for i, n in enumerate((12, 5, 1, 1))])
    assert torch.allclose(texts, F.normalize(dual.text(mean), dim=-1), atol=1e-6)
    mean = dual.image(vqgan.patchify(images, 8)).mean(1)
    assert torch.allclose(pictures, mean / mean.norm(dim=-1, keepdim=True), atol=1e-6)
    assert torch.allclose(
        dual.embed_text(F.pad(text[1:, :5], (0, 3))), dual.embed_text(text[1:, :5]), atol=1e-5
    ), "padding counts"
    assert torch.allclose(words, torch.zeros_like(words)), "all words equally likely at first"
    nn.init.normal_(dual.head.weight)
    *same, _, words = dual(text, images, hidden)
    assert torch.equal(words, dual.head(dual.encoder(hidden)[0])), "words show themselves"
    assert torch.equal(same[0], texts), "vectors are of whole texts"
    assert scale.item() == pytest.approx(1 / 0.07)  # F87: and at most 100
    dual.scale.data.fill_(9.0)
    assert dual(text, images, hidden)[2].item() == pytest.approx(100)


def test_alike_codes_start_alike():
    model, other = (Parti(dataclasses.replace(SMALL, width=256)) for _ in range(2))
    codes = F.normalize(torch.randn(24, 16), dim=-1)
    model.start_from(codes)
    other.start_from(codes)
    assert torch.equal(model.embed.weight, other.embed.weight), "processes would start apart"
    for weight, scale in ((model.embed.weight, 1), (model.head.weight, 1 / 16)):
        assert weight.std().item() == pytest.approx(scale, rel=0.1), "as initialise leaves tables"
        a, b = (
            F.cosine_similarity(weight[:, None], weight, dim=-1),
            F.cosine_similarity(codes[:, None], codes, dim=-1),
        )
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.9


# --- Adafactor -----------------------------------------------------------------------------------


def adafactor(*shapes, **options):
    """Parameters with random values, and the optimizer of them."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape)) for shape in shapes]
    return parameters, prior.Adafactor(parameters, **{"lr": 1e-2, "weight_decay": 0.0} | options)


def test_f93_the_first_update_is_the_sign_of_the_gradient():
    (vector,), optimizer = adafactor((64,), betas=(0.0, 0.96))
    before, vector.grad = vector.detach().clone(), torch.randn(64)
    optimizer.step()
    assert torch.allclose(vector, before - 1e-2 * vector.grad.sign(), atol=1e-6)
    square = optimizer.state[vector]["square"]
    assert torch.allclose(square, vector.grad.square()), "beta2 of the first step is not 0"
    first, vector.grad = vector.grad, torch.randn(64)
    optimizer.step()  # bias-corrected: the weighted mean of both squares
    expected = (0.96 * first.square() + vector.grad.square()) / 1.96
    assert torch.allclose(square.lerp(expected, 1.0), optimizer.state[vector]["square"])


def test_f94_f95_a_matrix_keeps_row_and_column_means_and_its_update_is_clipped():
    (matrix,), optimizer = adafactor((6, 8), betas=(0.0, 0.96))
    before = matrix.detach().clone()
    matrix.grad = torch.outer(torch.rand(6) + 0.1, torch.rand(8) + 0.1)
    optimizer.step()  # of rank one: the factors are exact
    assert torch.allclose(before - matrix, torch.full((6, 8), 1e-2), atol=1e-5)
    state = optimizer.state[matrix]
    assert state["rows"].numel() + state["columns"].numel() == 14
    before, matrix.grad = matrix.detach().clone(), 1e3 * torch.randn(6, 8)
    optimizer.step()
    assert (before - matrix).square().mean().sqrt() <= 1e-2 * 1.001, "an update of RMS above 1"


@pytest.mark.parametrize("shape", [(16, 8), (3, 4, 6), (5, 1, 8), (32,)])
def test_f91_f96_five_steps_of_adafactor_written_out(shape):
    """In float64 and without int8, which the bound allows for; any tensor factors its last axes."""
    (p,), optimizer = adafactor(shape, weight_decay=0.045, clip=0.5)
    x, m, squares = p.detach().double(), 0, []
    for t in range(1, 6):
        p.grad = torch.randn(shape) * torch.rand(shape) ** 3 * 2**t
        lr, g = 0.1 / t, p.grad.double()
        squares.append(g.square() + 1e-30)
        share = [0.96 ** (t - s) for s in range(1, t + 1)]  # an average with bias correction
        v = sum(a * b for a, b in zip(share, squares)) / sum(share)
        if len(shape) > 1:
            rows, columns = v.mean(-1, keepdim=True), v.mean(-2, keepdim=True)
            v = rows * columns / v.mean((-1, -2), keepdim=True)
        update = g / v.sqrt()
        m = 0.9 * m + 0.1 * update / max(1, update.square().mean().sqrt() / 0.5)
        x, optimizer.param_groups[0]["lr"] = x - lr * m - lr * 0.045 * x, lr
        optimizer.step()
        assert torch.allclose(p.double(), x, rtol=0, atol=2e-3 if len(shape) > 1 else 1e-6)


def test_f97_momentum_is_int8_and_its_round_trip_changes_nothing():
    (matrix,), optimizer = adafactor((16, 8))
    for _ in range(3):
        before, matrix.grad = matrix.detach().clone(), torch.randn(16, 8)
        optimizer.step()
    state = optimizer.state[matrix]
    assert state["momentum"].dtype == torch.int8 and state["bucket"].shape == (1, 8)
    moved = (before - matrix) / 1e-2  # by the momentum before it was rounded
    assert ((state["momentum"] - moved / state["bucket"]).abs() < 0.501).all(), "not to the nearest"
    values = state["momentum"] * state["bucket"]
    bucket = values.abs().amax(0, keepdim=True) / 127
    assert torch.equal((values / bucket).round().to(torch.int8), state["momentum"])
    assert state["momentum"].abs().amax(0).tolist() == [127] * 8


def test_adafactor_resumes_exactly_and_decays_by_itself():
    (a, vector), optimizer = adafactor((16, 8), (8,), weight_decay=0.1)
    gradients = [[torch.randn_like(p) for p in (a, vector)] for _ in range(6)]

    def steps(optimizer, gradients):
        for grads in gradients:
            for p, p.grad in zip(optimizer.param_groups[0]["params"], grads):
                pass
            optimizer.step()

    steps(optimizer, gradients[:3])
    copies = [nn.Parameter(p.detach().clone()) for p in (a, vector)]
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = prior.Adafactor(copies, lr=5.0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    steps(optimizer, gradients[3:])
    steps(again, gradients[3:])
    types = [again.state[p]["momentum"].dtype for p in copies]
    assert types == [torch.int8, torch.float32], "loading gives momentum the type of its parameter"
    assert torch.equal(a, copies[0]) and torch.equal(vector, copies[1])
    (still, unused), optimizer = adafactor((4, 4), (4, 4), weight_decay=0.1)
    before, after = still.detach().clone(), unused.detach().clone()
    still.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.allclose(still, before * (1 - 1e-2 * 0.1)), "decay must not depend on gradients"
    assert torch.equal(unused, after), "what has no gradient stays"


@slow
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_prior_overfits_one_batch(name):
    model, text, tokens = small_prior(kernel=3)
    model.train()
    recipe = train_prior.RECIPES["tiny"]
    recipe = dataclasses.replace(recipe, optimizer=name, lr=1e-2, weight_decay=0.0)
    optimizer, losses = train_prior.make_optimizer(model, recipe), []
    for _ in range(100):
        logits = model(text, tokens)
        losses.append(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 < 2 < losses[0]


# --- training the prior --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A small tokenizer as it came from its initialisation: 24 codes, 4 x 4 tokens of 32 x 32."""
    torch.manual_seed(0)
    sizes = dict(width=32, layers=1, heads=2, mlp=64, codes=24, code_dim=8, decoder_layers=0)
    config = dataclasses.replace(TINY, **sizes)
    path = tmp_path_factory.mktemp("tokenizer") / "vqgan.pt"
    model = VQGAN(config).state_dict()
    torch.save({"config": dataclasses.asdict(config), "model": model, "step": 1}, path)
    return path


@pytest.fixture
def train(tokenizer_file, tmp_path):
    """train(name, *options, world=1): a run in tmp_path/name -> its log, its checkpoint."""

    def run(name, *options, world=1, stage="prior", steps=6, kill=None):
        out = tmp_path / name
        argv = f"--vqgan {tokenizer_file} --stage {stage} --steps {steps} --batch 8 --width 32"
        argv += " --heads 2 --mlp 64 --encoder-layers 1 --decoder-layers 2 --kernel 3"
        argv += " --text-length 16 --warmup 1 --save-every 3 --log-every 1 --seed 1"
        argv += " --dtype float32 --device cpu"
        until = kill and (lambda: len(log_of(out, stage)) >= kill)
        run_script("train_prior.py", out, [*argv.split(), *options], world, until)
        return log_of(out, stage), torch.load(out / f"{stage}.pt", weights_only=True)

    return run


def log_of(out, name):
    path = out / f"{name}.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def column(log, name):
    return [float(row[name]) for row in log if row[name]]


def same(a, b, path="checkpoint"):
    """Two nests of dicts, lists, tensors and numbers are equal bit for bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{path}/{i}")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    else:
        assert a == b, path


@slow
def test_an_interrupted_run_continues_bit_for_bit(train):
    options = "--optimizer adafactor --dropout 0.1 --drop 0.3 --save-every 12".split()
    log, whole = train("whole", *options, steps=24)
    _, stopped = train("parts", *options, steps=24, kill=4)
    assert 4 <= stopped["step"] < 24, "SIGTERM came too late for this test"
    again, resumed = train("parts", *options, steps=24)
    same(whole["model"], resumed["model"])
    same(whole["optimizer"], resumed["optimizer"])
    assert column(log, "step") == column(again, "step") == list(range(1, 25))
    for name in ("loss", "grad_norm", "held_out"):
        assert column(log, name) == column(again, name)


@slow
def test_processes_shards_and_parts_are_one_process_on_the_same_global_batch(train, tmp_path):
    """DDP; FSDP, whose checkpoint then continues in one process; parts of a batch."""
    adafactor = "--optimizer", "adafactor"
    log, one = train("one", *adafactor, steps=6)
    again, two = train("two", *adafactor, steps=4, world=2)
    for name in ("loss", "grad_norm"):
        assert column(log, name)[:4] == pytest.approx(column(again, name), rel=1e-3), name
    assert column(log, "held_out")[0] == pytest.approx(column(again, "held_out")[0], rel=1e-3)
    train("sharded", "--fsdp", *adafactor, world=2, steps=3)
    train("sharded", "--fsdp", "--accumulate", "2", *adafactor, world=2, steps=4)
    again, shards = train("sharded", *adafactor, "--accumulate", "2")
    assert column(log, "loss") == pytest.approx(column(again, "loss"), rel=1e-3)
    assert column(again, "step") == list(range(1, 7))
    for name, value in one["model"].items():
        assert torch.allclose(value, shards["model"][name], atol=1e-3), name
    assert prior.load(tmp_path / "sharded/prior.pt").config.width == 32


@slow
def test_the_text_stage_is_the_same_on_two_processes(train):
    log, one = train("one", stage="text", steps=3)
    for name, options in (("two", ()), ("sharded", ("--fsdp",))):
        again, other = train(name, *options, stage="text", steps=3, world=2)
        for measure in ("loss", "grad_norm", "held_out"):
            assert column(log, measure) == pytest.approx(column(again, measure), rel=1e-3)
        for key, value in one["model"].items():
            assert torch.allclose(value, other["model"][key], atol=1e-3), key


@slow
def test_the_prior_learns_and_starts_from_the_text_stage(train, tmp_path):
    log, text = train("text", "--save-every", "30", stage="text", steps=20)
    assert column(log, "loss")[-1] < 0.9 * column(log, "loss")[0]
    options = "--text", str(tmp_path / "text/text.pt"), "--save-every", "30"
    log, started = train("prior", *options, steps=30)
    losses = column(log, "loss")
    assert losses[-1] < 0.6 * losses[0]
    assert started["config"]["text_vocab"] == text["config"]["text_vocab"]
    same(text["text"], started["text"])
    assert (tmp_path / "prior/prior.png").exists()


@slow
def test_a_continued_prior_keeps_its_vocabulary_though_captions_have_changed(train, tmp_path):
    folder = tmp_path / "pictures/dog"
    folder.mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(folder / f"{i}.png")
    options = "--preset", "tiny", "--data", str(folder.parent)
    _, first = train("prior", *options, steps=3)
    folder.rename(folder.parent / "zebra")
    _, then = train("prior", *options, steps=4)
    assert then["step"] == 4
    same(first["text"], then["text"])


def test_f88_f99_f101_f108_the_recipe_of_the_paper():
    recipe = train_prior.PAPER
    assert recipe.steps * recipe.batch == pytest.approx(3.69e9, rel=1e-3)  # pairs
    assert (recipe.clip, recipe.drop, recipe.pieces, recipe.guidance) == (4.0, 0.1, 16_000, 1.2)
    assert (recipe.temperature, recipe.top_k, recipe.top_p) == (1.0, 0, 1.0), "plain sampling"


def small_run(stage, tokenizer_file, out, monkeypatch, *options):
    """A run of the tiny prior whose rate is 0 -> its checkpoint, which is where it started."""
    options = f"--stage {stage} --device cpu --dtype float32 --lr 0 --width 32 --heads 2 --mlp 64 \
        --encoder-layers 1 --decoder-layers 1 --batch 8 --log-every 1".split() + [*options]
    out.mkdir(exist_ok=True)
    options += ["--vqgan", tokenizer_file, "--out", out]
    main_of(train_prior, options, monkeypatch)
    return torch.load(out / f"{stage}.pt", weights_only=True)


def test_both_stages_start_from_the_text_encoder_and_its_words(
    tokenizer_file, tmp_path, monkeypatch, restore_signals
):
    dropped, stream = [], data.Stream
    monkeypatch.setattr(data, "Stream", lambda *a: dropped.append(a[2]) or stream(*a))

    def run(stage, out, *options):
        out = tmp_path / out
        return small_run(stage, tokenizer_file, out, monkeypatch, "--steps", 1, *options)

    first = run("text", "first", "--seed", 1, "--pieces", 300)
    options = "--text", tmp_path / "first/text.pt"
    again = run("text", "again", *options)
    assert not any(dropped), "only the prior learns to draw without a text"
    started = run("prior", "prior", *options)
    assert max(dropped) == 0.1
    for saved in (again, started):
        for name in filter(lambda name: name.startswith("encoder."), first["model"]):
            assert torch.equal(saved["model"][name], first["model"][name]), name
        same(first["text"], saved["text"])
    warm, cold = (saved["model"]["image.embed.weight"] for saved in (first, again))
    assert not torch.equal(warm, cold), "the image tower starts anew"
    (tmp_path / "first/text.pt").unlink()
    run("prior", "prior", *options, "--steps", 2)  # it has its own by now


def test_what_a_prior_keeps_for_sampling_and_how_it_is_evaluated(
    tokenizer_file, tmp_path, monkeypatch, restore_signals
):
    """By the mean over 256 held-out pictures, no more at a time than training holds, without
    dropout; and training goes on as if it had not been."""
    held, encode = [], VQGAN.encode
    monkeypatch.setattr(VQGAN, "encode", lambda *a: held.append(len(a[1])) or encode(*a))
    options = "--steps 2 --accumulate 2 --drop 0.5 --dropout 0.5 --seed 3 --temperature 0".split()
    options += "--top-k 5 --guidance 2".split()

    def run(out, *more):
        more = *options, *more
        saved = small_run("prior", tokenizer_file, tmp_path / out, monkeypatch, *more)
        return saved, log_of(tmp_path / out, "prior")

    saved, log = run("often", "--save-every", 1)
    assert {*held} == {4}
    assert column(log, "loss") == column(run("once")[1], "loss")
    assert saved["sampling"] == {"guidance": 2.0, "temperature": 0.0, "top_k": 5, "top_p": 0.95}
    assert (saved["vqgan"], saved["image_size"], saved["patch"]) == (str(tokenizer_file), 32, 8)
    assert saved["val"] == {"data": "", "captions": ""}
    text = data.Text(saved["text"].numpy().tobytes(), saved["config"]["text_length"])
    images, words = next(data.batches(data.Scenes("seen", 32, 3), 256, 3, 0, 1, text=text))
    model = prior.load(tmp_path / "often/prior.pt")
    loss = train_prior.prior_loss(model, images / 255, words, vqgan.load(tokenizer_file))
    assert column(log, "held_out") == pytest.approx([loss.item()] * 2, rel=1e-4)
    sheet = np.asarray(Image.open(tmp_path / "often/prior.png"))  # 8 captions, 4 samples
    rows = [sheet[y * 150 :][:132] for y in range(8)]
    assert all((row[:, :132] == row[:, x * 132 :][:, :132]).all() for row in rows for x in range(4))
    assert (rows[0] != rows[1]).any(), "temperature 0: one picture for each caption"


def test_f84_f86_f87_the_text_stage_adds_both_losses():
    """At first every word is equally likely: ln V for each that is hidden."""
    torch.manual_seed(0)
    dual, run = DualEncoder(SMALL, 32), stand_in(Path(), argparse.Namespace(seed=0, batch=4))
    text, images, seen = torch.randint(4, 50, (4, 12)), torch.rand(4, 3, 32, 32), []
    texts, pictures, scale, _ = dual(text, images, text)
    contrast = prior.contrastive_loss(texts, pictures, scale).item()

    def loss(step, words=None):
        def network(*how):
            seen.append(how[2])
            *others, guess = dual(*how)
            return (*others, guess if words is None else words)

        return train_prior.text_loss(network, images, text, SMALL, run, step).item()

    assert loss(1) == pytest.approx(contrast + math.log(50), rel=1e-5)
    sure = 99.0 * F.one_hot(text, 50)
    assert loss(1, sure) == pytest.approx(contrast, rel=1e-5), "the words that were hidden"
    loss(2)
    assert (seen[0] == prior.MASK).any(), "nothing was hidden"
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_alike_codes_start_alike_where_asked(tokenizer_file):
    tokenizer = vqgan.load(tokenizer_file)

    def made(**how):
        recipe = dataclasses.replace(train_prior.RECIPES["tiny"], **how)
        return train_prior.make_model(train_prior.Options(), SMALL, recipe, tokenizer, None)

    square = made().embed.weight.square().sum(1).mean().item()
    assert square == pytest.approx(32, rel=0.3), "of random codes: a unit code times the width"
    assert not made(code_start=False).head.weight.any() and made().head.weight.any()
    assert not torch.equal(made(seed=1).start, made().start)


def test_warm_start_takes_the_encoder_alone(tokenizer_file):
    torch.manual_seed(3)
    warm = DualEncoder(SMALL, 32)
    tokenizer = vqgan.load(tokenizer_file)
    recipe = dataclasses.replace(train_prior.RECIPES["tiny"], code_start=False)
    cold, model = (
        train_prior.make_model(train_prior.Options(), SMALL, recipe, tokenizer, state)
        for state in (None, warm)
    )
    for name, value in model.state_dict().items():
        expected = warm.state_dict() if name.startswith("encoder.") else cold.state_dict()
        assert torch.equal(value, expected[name]), name


def test_f91_matrices_decay_and_vectors_do_not():
    model = Parti(SMALL)
    optimizer = train_prior.make_optimizer(model, train_prior.PAPER)
    assert isinstance(optimizer, prior.Adafactor)
    matrices, vectors = optimizer.param_groups
    assert matrices["betas"] == (0.9, 0.96) and matrices["lr"] == 4.5e-5
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.045, 0.0)
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_f70_the_loss_is_the_mean_over_tokens_and_text_is_cut_to_the_longest():
    model, text, _ = small_prior()
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    tokenizer = VQGAN(dataclasses.replace(TINY, codes=24))
    pixels, cut = train_prior.prepare(images, F.pad(text[1:], (0, 9)), "cpu")
    assert cut.shape == (3, 5) and pixels.max() <= 1 and pixels.dtype == torch.float32
    loss = train_prior.prior_loss(model, pixels, text, tokenizer)
    tokens = tokenizer.encode(pixels)
    expected = -model(text, tokens).log_softmax(-1).gather(-1, tokens[..., None]).mean()
    assert torch.allclose(loss, expected)


def test_f88_a_share_of_the_captions_is_dropped():
    scenes = data.Scenes(size=8)
    captions, whole = (
        [caption for _, caption, _ in map(data.Stream(scenes, 0, drop).__getitem__, range(1000))]
        for drop in (0.1, 0.0)
    )
    assert 0.07 < captions.count("") / 1000 < 0.13 and "" not in whole


# --- drawing and measuring ----------------------------------------------------------------------


def trained_parts(out, size=64, width=32, seed=0):
    out = Path(out)
    out.mkdir(exist_ok=True, parents=True)
    torch.manual_seed(seed)
    vc = dataclasses.replace(
        vqgan.PRESETS["tiny"], image_size=size, width=width, mlp=64, decoder_layers=1, codes=256
    )
    v = vqgan.VQGAN(vc)
    torch.save({"config": vars(vc), "model": v.state_dict(), "step": 1}, out / "vqgan.pt")
    lc = dataclasses.replace(vc, decoder_width=64, decoder_heads=4, decoder_mlp=64)
    big = vqgan.VQGAN(lc)
    big.encoder = v.encoder
    big.codebook = v.codebook
    big.decoder.project.weight.data *= 20  # pictures reach beyond [0, 1]
    torch.save({"config": vars(lc), "model": big.state_dict(), "step": 1}, out / "decoder.pt")
    words = data.train_tokens(data.Scenes("train").captions(2000), 16000)
    t = data.Text(words, 32)
    pc = dict(width=width, mlp=64, encoder_layers=1, decoder_layers=1, codes=256, grid=size // 8)
    pc = dataclasses.replace(prior.PRESETS["tiny"], text_vocab=t.vocab, **pc)
    p = prior.Parti(pc)
    nn.init.normal_(p.head.weight, std=0.3)  # it is zero at first: the text would not matter
    text = torch.tensor(list(words), dtype=torch.uint8)
    base = {"text": text, "image_size": size, "patch": 8, "step": 1, "config": vars(pc)}
    sampling = dict(guidance=1.3, temperature=0.8, top_k=0, top_p=0.95)
    more = {"model": p.state_dict(), "vqgan": "", "tokenizer_fingerprint": v.fingerprint()}
    torch.save({**base, **more, "sampling": sampling}, out / "prior.pt")
    dual = prior.DualEncoder(pc, size // 2, 8)  # it looks at pictures of half the size
    torch.save({**base, "image_size": size // 2, "model": dual.state_dict()}, out / "text.pt")
    c = dict(scale=2, width=8, blocks=1)
    larger = vqgan.Upsampler(**c)
    larger[0].skip.bias.data += 0.5  # brighter by a quarter
    torch.save({"config": c, "model": larger.state_dict(), "step": 1}, out / "upsampler.pt")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    trained_parts(folder, 32)
    return folder


def linked(out, folder):
    """The same checkpoints in a folder of its own."""
    folder.mkdir(exist_ok=True)
    for name in ("vqgan", "decoder", "prior", "text", "upsampler"):
        os.link(out / f"{name}.pt", folder / f"{name}.pt")
    return folder


def painter_of(out, **options):
    return sample.Painter(sample.Options(out=str(out), device="cpu", dtype="float32", **options))


def call(monkeypatch, *words):
    main_of(sample, ["--device", "cpu", "--dtype", "float32", *words], monkeypatch)


def spd(d, seed):
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T / d


def test_frechet_equal():
    s = spd(20, 0)
    mu = torch.randn(20)
    assert abs(sample.frechet(mu, s, mu, s)) < 1e-9
    x = torch.randn(5, 20)
    m = sample.moments([x])  # rank-deficient
    assert abs(sample.frechet(*m, *m)) < 1e-5


def test_frechet_shift():
    s = spd(20, 0)
    mu = torch.randn(20).double()
    assert sample.frechet(mu, s, mu + 0.5, s) == pytest.approx(20 * 0.25, abs=1e-9)


def test_frechet_commuting():
    q = torch.linalg.eigh(spd(12, 1))[1]
    a, b = torch.rand(12).double() * 5, torch.rand(12).double()
    s1, s2 = q * a @ q.T, q * b @ q.T
    zero = torch.zeros(12)
    assert sample.frechet(zero, s1, zero, s2) == pytest.approx(
        ((a.sqrt() - b.sqrt()) ** 2).sum().item(), abs=1e-9
    )


def test_frechet_of_two_by_two_by_hand_and_in_float64():
    """The eigenvalues x, y of s1 s2 have (sqrt x + sqrt y)^2 = trace + 2 sqrt det."""
    s1, s2 = torch.tensor([[2.0, 1], [1, 2]]), torch.tensor([[1.0, 0], [0, 4]])
    zero = torch.zeros(2)
    want = 4 + 5 - 2 * (10 + 2 * 12**0.5) ** 0.5
    assert sample.frechet(zero, s1, zero, s2) == pytest.approx(want, abs=1e-12)
    large, larger = (variance * torch.eye(2) for variance in (1e8, 1.0002e8))
    want = 2 * (1.0002e8**0.5 - 1e4) ** 2  # 2.0 of 4e8: float32 has 7 digits
    assert sample.frechet(zero, large, zero, larger) == pytest.approx(want, rel=1e-6)


def test_moments_of_all_parts_together_in_float64():
    x = torch.randn(50, 4) + 1e4
    mu, s = sample.moments([x[:20], x[20:]])
    assert np.allclose(mu, x.double().mean(0), rtol=1e-12)
    assert np.allclose(s, np.cov(x.double().numpy().T), rtol=1e-10)


@pytest.mark.parametrize(
    "right, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (95, 100, 0.8882, 0.9785),
    ],
)
def test_wilson(right, n, low, high):
    assert sample.wilson(right, n) == pytest.approx([low, high], abs=1e-4)


def test_best():
    pictures = torch.arange(12).view(2, 6)
    got, score = sample.best(
        pictures, torch.tensor([[0, 3, 1, 2, 9, 0.0], [0, 0, 0, 0, 0, 0.0]]), 3
    )
    assert got.tolist() == [[4, 1, 3], [6, 7, 8]] and score[0].tolist() == [9, 3, 2]


@pytest.mark.parametrize(
    "text",
    ["../../etc/passwd", 'a "b" <c>|?*:\\', "漢字", "", "CON", "x" * 5000, ".hidden", "a\nb\0c"],
)
def test_slug(text):
    name = sample.slug(text)
    assert len(name) <= 60 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


TSV = (
    '\ufeffPrompt\tCategory\tChallenge\tNote\r\n"a quote" unclosed " here\tArts\tBasic\tn\r\n'
    "Füße und 漢字\tFood & Beverage\tWriting & Symbols\t\r\n"
    + "word " * 67
    + "\tArts\tComplex\tx\r\n"
)


def test_f124_partiprompts_are_read_with_literal_quotes(tmp_path):
    (tmp_path / "p.tsv").write_text(TSV, encoding="utf-8", newline="")
    rows = sample.read_prompts(tmp_path / "p.tsv")
    assert [r["Category"] for r in rows] == ["Arts", "Food & Beverage", "Arts"]
    assert rows[0]["Prompt"] == '"a quote" unclosed " here' and rows[1]["Prompt"] == "Füße und 漢字"
    (tmp_path / "p.txt").write_text('one "x\n\n two\n', encoding="utf-8")
    assert [r["Prompt"] for r in sample.read_prompts(tmp_path / "p.txt")] == ['one "x', " two"]
    (tmp_path / "e").write_text("\n")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    for name in ("e", "b", "missing"):
        with pytest.raises(SystemExit, match="--prompts"):
            sample.read_prompts(tmp_path / name)


def test_what_is_missing_foreign_or_without_effect_is_one_line(monkeypatch, tmp_path, out):
    with pytest.raises(SystemExit, match="python train_vqgan.py && python train_prior.py"):
        call(monkeypatch, "a", "--out", tmp_path)
    with pytest.raises(SystemExit, match="python train_vqgan.py"):
        call(monkeypatch, "--evaluate", "--out", tmp_path)
    for name in ("vqgan", "prior"):
        os.link(out / f"{name}.pt", tmp_path / f"{name}.pt")
    with pytest.raises(SystemExit, match="train_prior.py --stage text"):
        call(monkeypatch, "a", "--out", tmp_path, "--rerank", 2)
    with pytest.raises(SystemExit, match="train_vqgan.py --stage upsampler"):
        call(monkeypatch, "a", "--out", tmp_path, "--upsample")
    with pytest.raises(SystemExit, match="no prompt"):
        call(monkeypatch, "--out", tmp_path)
    with pytest.raises(SystemExit, match="too much at once"):
        call(monkeypatch, "a", "--evaluate", "--out", tmp_path)
    with pytest.raises(SystemExit, match="--n 0"):
        call(monkeypatch, "a", "--n", 0, "--out", tmp_path)
    os.link(out / "vqgan.pt", tmp_path / "text.pt")  # of another kind
    with pytest.raises(SystemExit, match="text.pt is damaged or of another kind"):
        call(monkeypatch, "a", "--out", tmp_path, "--rerank", 2)
    with pytest.raises(SystemExit, match="--guidence"):
        call(monkeypatch, "a", "--guidence", 3)
    with pytest.raises(SystemExit, match="from -1"):
        call(monkeypatch, "a", "--temperature", "-2")
    for option in ("--data", "--captions", "--inception"):
        with pytest.raises(SystemExit, match=f"{option} has no effect on what is asked"):
            call(monkeypatch, "a", option, "x", "--out", tmp_path)
    with pytest.raises(SystemExit, match="--upsample has no effect on what is asked"):
        call(monkeypatch, "--evaluate", "--upsample", "--out", tmp_path)
    trained_parts(tmp_path / "other", 32, seed=1)  # of the same sizes: pictures would be noise
    with pytest.raises(SystemExit, match="not the tokenizer that .*prior.pt was trained with"):
        call(monkeypatch, "a", "--out", tmp_path, "--vqgan", tmp_path / "other" / "vqgan.pt")
    os.link(tmp_path / "other/decoder.pt", tmp_path / "decoder.pt")
    painter = painter_of(tmp_path)
    assert painter.decoder is painter.vqgan, "another tokenizer's decoder is not used"


def test_f111_each_caption_has_its_own_candidates_of_which_the_most_similar_are_kept(out):
    captions = ["a red circle", "two green crosses"]
    with torch.no_grad():
        greedy = painter_of(out, temperature=0.0)
        pictures, scores = greedy.draw(captions, 2)
        for caption, own, other in zip(captions, pictures, pictures.flip(0)):
            alone = greedy.draw([caption])[0][0]
            assert torch.allclose(own, alone, atol=1e-4) and (own - other).abs().max() > 0.1
        assert not scores.any(), "there is no ranker"

        painter = painter_of(out, n=2, rerank=5, upsample=True)
        pictures, scores = painter.draw(captions, 5)
        assert pictures.aminmax() == (0, 1)
        for caption, candidates, row in zip(captions, pictures, scores):
            text = painter.ranker.embed_text(painter.ranker_text([caption]))
            seen = painter.ranker.embed_images(F.avg_pool2d(candidates, 2))
            assert torch.allclose(F.cosine_similarity(text, seen), row, atol=1e-5)
        kept = torch.stack([x[row.topk(2).indices] for x, row in zip(pictures, scores)])
        painter.generator.manual_seed(0)
        nearest = kept.repeat_interleave(2, -1).repeat_interleave(2, -2)  # what it was saved as
        assert torch.allclose(painter.paint(captions), (nearest + 0.25).clamp(0, 1), atol=1e-5)


def test_any_prompt_is_drawn_and_the_sheet_is_labelled(monkeypatch, out, capsys):
    odd = ["a red circle", "", "x" * 10_000, "Füße 漢字 \udcff", "line\nbreak"]
    shown = []
    monkeypatch.setattr(sample, "save_grid", lambda *a: shown.append(a) or data.save_grid(*a))
    more = "--upsample", "--temperature", 0, "--rerank", 3, "--out", out
    call(monkeypatch, "--n", 2, odd[0], *more, *odd[1:])
    assert str(out / "samples.png") in capsys.readouterr().out
    assert Image.open(out / "samples.png").size == (2 * (128 + 4), 5 * (128 + 4 + 18))
    [(_, pictures, labels)] = shown
    assert pictures.shape == (5, 2, 3, 64, 64) and labels[:2] == ["a red circle", "(no text)"]
    assert not pictures.requires_grad, "drawing needs no graph"


def test_the_checkpoint_says_how_to_sample_and_the_seed_what(out, tmp_path):
    with torch.no_grad():
        a, b, c = (painter_of(out, seed=i).draw(["a red circle"], 3)[0] for i in (0, 0, 1))
    assert torch.equal(a, b) and a.shape == (1, 3, 3, 32, 32) and not torch.equal(a, c)
    painter = painter_of(out, guidance=0.0, top_k=7)
    assert painter.sampling == dict(guidance=0.0, temperature=0.8, top_k=7, top_p=0.95)
    assert painter.decoder is not painter.vqgan
    saved = torch.load(out / "prior.pt", weights_only=True)
    torch.save(saved | {"vqgan": str(out / "vqgan.pt")}, tmp_path / "prior.pt")
    used = painter_of(tmp_path).vqgan.fingerprint()
    assert used == saved["tokenizer_fingerprint"], "where it said"


def test_a_file_of_prompts_is_drawn_once_and_again_when_anything_has_changed(
    monkeypatch, out, tmp_path
):
    out, prompts = linked(out, tmp_path / "out"), tmp_path / "p.tsv"
    prompts.write_text(TSV, encoding="utf-8", newline="")
    monkeypatch.setattr(sample, "BATCH", 4)  # groups of two prompts
    folder = out / "prompts"

    def run(*more):
        """-> the names of the new pictures"""
        there = {*folder.glob("0*.png")}
        call(monkeypatch, "--prompts", prompts, "--n", 2, "--out", out, *more)
        return sorted({*folder.glob("0*.png")} - there)

    limited = run("--limit", 2)
    drawn_at = limited[0].stat().st_mtime_ns
    pictures = limited + run()
    assert len(limited) == 4 and len(pictures) == 6 and not run()
    assert drawn_at == limited[0].stat().st_mtime_ns, "it was there already"
    assert Image.open(pictures[0]).size == (32, 32)
    names = "category-arts category-food-beverage challenge-basic challenge-complex"
    assert {p.stem for p in folder.glob("c*.png")} == {*names.split(), "challenge-writing-symbols"}
    assert Image.open(folder / "category-arts.png").size == (2 * 132, 2 * 150)  # of two prompts
    before = {p: p.read_bytes() for p in pictures}
    for p in pictures[3:]:
        p.unlink()
    run()
    assert before == {p: p.read_bytes() for p in sorted(folder.glob("0*.png"))}, (
        "resume drew other pictures"
    )
    for more in ("--guidance 3", "--rerank 3", "--rerank 4", "--upsample"):
        assert len(run(*more.split())) == 6, more
    assert run("--seed", 1)[0].read_bytes() != before[pictures[0]]
    assert len(run("--n", 1)) == 3 and not list(folder.glob("*.tmp"))
    prompts.write_text(TSV.replace("quote", "QUOTE"), encoding="utf-8", newline="")
    assert len(run()) == 6, "other prompts, though of the same names"

    prompts.write_text("a\nb\na\nb\n")
    first, _, _, second, third, *_ = map(Path.read_bytes, run())
    assert first != third, "groups share their random numbers"
    a, same, b, *_ = (np.asarray(Image.open(p)) for p in run("--temperature", 0))
    with torch.no_grad():
        alone = painter_of(out, temperature=0.0).draw(["a"])[0][0, 0]
    assert np.abs(a - alone.mul(255).permute(1, 2, 0).numpy()).max() < 1
    assert (a == same).all() and (a != b).any()
    saved = torch.load(out / "prior.pt", weights_only=True)
    saved["model"]["head.weight"] += 1
    (out / "prior.pt").unlink()
    torch.save(saved, out / "prior.pt")
    assert len(run()) == 8, "the prior has been trained since"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample.Painter, "paint", stop)
    with pytest.raises(SystemExit, match="stopped"):
        data.launch(lambda: run("--guidance", 4))


def test_f32_f42_f111_what_evaluation_measures(out, tmp_path):
    """Each figure from its definition. Of features (f, 0) the Fréchet distance is the squared
    difference of the means of f and that of its deviations."""
    (tmp_path / "net").touch()
    painter = painter_of(linked(out, tmp_path / "out"), rerank=4, inception=str(tmp_path / "net"))
    scenes = data.Scenes("seen", 32, 0)
    images, captions = next(data.batches(scenes, 6, 0, 0, 1))
    real = images / 255

    def features(pictures):
        return F.pad(pictures.flatten(1).mean(1, keepdim=True), (0, 1))

    def distance(pictures):
        a, b = (x.double().mean((1, 2, 3)) for x in (real, pictures))
        return pytest.approx([((a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2).item()] * 6)

    def measured(*how):
        painter.generator.manual_seed(0)
        table = {}
        for key, values in sample.measure(painter, scenes, 6, *how):
            table[key] = table.get(key, []) + values
        return table

    def drawn(guidance):
        painter.generator.manual_seed(0)
        return painter.draw(captions, 4, guidance=guidance)

    with torch.no_grad():
        tokens = painter.vqgan.encode(real)
        copies = painter.decoder.decode(tokens).clamp(0, 1)
        logits = painter.prior(painter.text(captions), tokens).double()
        table = measured(None, features)
        error = (real.double() - copies).square().mean((1, 2, 3))
        surprise = -logits.log_softmax(-1).gather(-1, tokens[..., None]).mean((1, 2))
        for what, values in {
            "tokenizer: MSE": error,
            "tokenizer: PSNR, dB": 10 * (1 / error).log10(),
            "tokenizer: codebook usage, 6 pictures": torch.tensor([len(tokens.unique()) / 256] * 6),
            "prior: cross-entropy, nats per token": surprise,
        }.items():
            assert table["", "", what] == pytest.approx(values.tolist(), rel=1e-4), what
        assert table["", "", "rFID"] == distance(copies)
        pictures, scores = drawn(1.3)
        best = pictures[torch.arange(6), scores.argmax(1)]
        assert table[1.3, 1, "FID"] == distance(pictures[:, 0])
        assert table[1.3, 4, "FID"] == distance(best) != table[1.3, 1, "FID"]
        for scale in (1.0, 3.0):
            scores, table = drawn(scale)[1], measured(scale)
            assert table[scale, 1, "text-image cosine"] == pytest.approx(scores[:, 0].tolist())
            assert table[scale, 4, "text-image cosine"] == pytest.approx(scores.amax(1).tolist())
            assert {what for *_, what in table} == {"text-image cosine", "right: all"}
        assert not torch.allclose(scores, drawn(1.0)[1])


class Net(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        return x.float().mean((2, 3)) if return_features else x.float()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what Inception comes in
def test_the_table_of_an_evaluation_on_scenes(monkeypatch, out, capsys, tmp_path):
    torch.jit.script(Net()).save(str(tmp_path / "inception.pt"))
    monkeypatch.setattr(sample, "SWEEP", (1.0, 2.0))
    monkeypatch.setattr(sample, "open_data", lambda *a: data.Scenes(a[-2], 32, a[-1]))
    monkeypatch.setattr(sample, "check", lambda picture, caption: "circle" in caption)
    options = f"--evaluate --limit 10 --temperature 0 --inception {tmp_path}/inception.pt --out"
    call(monkeypatch, *options.split(), out)
    rows = list(csv.DictReader(open(out / "evaluate.csv", encoding="utf-8")))
    at = {(r["split"], r["guidance"], r["candidates"], r["measure"]): r for r in rows}
    splits = {"seen", "combination", "pair"}
    assert {r["split"] for r in rows} == splits | {"sweep: " + split for split in splits}
    for split in splits:
        assert at[split, "1.3", "1", "right: all"]["n"] == "10"
        for name in ("tokenizer: codebook perplexity", "reconstruction right: all"):
            assert (split, "", "", name) in at, name
        assert (split, "1.3", "1", "FID") in at
    assert ("sweep: pair", "2.0", "1", "right: all") in at
    first = at["combination", "1.3", "1", "right: all"]
    k = round(float(first["value"]) * 10)
    assert [float(first["low"]), float(first["high"])] == pytest.approx(sample.wilson(k, 10))
    for split, named in (("seen", "one object"), ("combination", "relation"), ("pair", "relation")):
        assert any(key[0] == split and key[3].startswith(f"right: {named}") for key in at), split
    assert at["sweep: pair", "2.0", "8", "right: all"]["n"] == "2", "a fifth of the captions"
    sheet = np.asarray(Image.open(out / "guidance.png"))  # the same captions at every scale
    assert sheet.shape[:2] == (2 * 150, 8 * 132)
    assert (sheet[:132] != sheet[150:][:132]).any(), "guidance changes nothing"
    shown = capsys.readouterr()
    assert "degenerate below 2,048" in shown.out + shown.err and "sweep: pair" in shown.out
    assert len(list(out.glob("fid-*.pt"))) == 3


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what Inception comes in
def test_f117_evaluation_of_a_folder_keeps_the_statistics_of_its_pixels(monkeypatch, out, tmp_path):
    torch.jit.script(Net()).save(str(tmp_path / "inception.pt"))
    folder = tmp_path / "pics" / "frog"
    folder.mkdir(parents=True)
    held = [i for i in range(2000) if zlib.crc32(f"frog/{i}.png".encode()) % 50 == 0][:7]
    for i in held + [i for i in range(9) if i not in held]:
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (20, 25, 3), dtype=np.uint8)
        ).save(folder / f"{i}.png")
    options = sample.Options(out=str(tmp_path), inception=str(tmp_path / "inception.pt"))
    inception = sample.load_inception(options.inception, torch.device("cpu"))
    dataset = data.open_data(str(tmp_path / "pics"), "", 32, data.prior_crop, "held-out")
    mu, s = sample.reference(inception, dataset, 7, options)
    real = [inception(x / 255) for x, _ in sample.held_out(dataset, 7, 0, "")]
    assert sum(map(len, real)) == len(dataset) == 7 and torch.allclose(mu, sample.moments(real)[0])

    def fail(images):
        raise AssertionError("the cached statistics were not used")

    assert torch.equal(sample.reference(fail, dataset, 7, options)[1], s)
    assert inception(torch.full((1, 3, 9, 9), 0.2)).tolist() == [[51.0] * 3], "bytes"
    (tmp_path / "other.pt").write_bytes((tmp_path / "inception.pt").read_bytes() + b"0")
    other = dataclasses.replace(options, inception=str(tmp_path / "other.pt"))
    with pytest.raises(AssertionError):  # another network, other statistics
        sample.reference(fail, dataset, 7, other)
    with pytest.raises(AssertionError):  # other pixels, other statistics
        Image.new("RGB", (40, 40), "red").save(tmp_path / "pics" / dataset.names[0])
        sample.reference(fail, dataset, 7, options)
    folder_of_pictures = "--evaluate", "--data", tmp_path / "pics", "--out"
    call(monkeypatch, *folder_of_pictures, out, "--inception", tmp_path / "inception.pt")
    rows = list(csv.DictReader(open(out / "evaluate.csv", encoding="utf-8")))
    assert {r["split"] for r in rows} == {"held-out"}
    assert {"FID", "rFID", "text-image cosine"} <= {r["measure"] for r in rows}
    with pytest.raises(SystemExit, match="--inception"):
        call(monkeypatch, "--evaluate", "--out", out, "--inception", folder / "1.png")

    there = linked(out, tmp_path / "there")
    saved = torch.load(there / "prior.pt", weights_only=True)
    (there / "prior.pt").unlink()
    saved["val"] = {"data": str(tmp_path / "pics"), "captions": "missing.json"}
    torch.save(saved, there / "prior.pt")
    with pytest.raises(SystemExit, match="missing.json"):  # what it was trained on
        call(monkeypatch, "--evaluate", "--out", there, "--limit", 2)
    call(monkeypatch, *folder_of_pictures, there, "--limit", 2)
    saved["val"]["captions"] = ""
    torch.save(saved, there / "prior.pt")
    call(monkeypatch, "--evaluate", "--out", there, "--limit", 2)
    assert "\nheld-out," in (there / "evaluate.csv").read_text()


def test_held_out_count():
    dataset = data.Scenes("seen", 16, 0)
    assert sum(len(c) for _, c in sample.held_out(dataset, 130, 0, "")) == 130


def test_evaluate_stopped(monkeypatch, out, capsys):
    real, calls = sample.held_out, []

    def stop(*a):
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from real(*a)

    monkeypatch.setattr(sample, "held_out", stop)
    monkeypatch.setattr(sample, "open_data", lambda *a: data.Scenes(a[-2], 32, a[-1]))
    call(monkeypatch, "--evaluate", "--limit", 4, "--out", out)
    shown = capsys.readouterr().out
    assert "stopped" in shown and "right: all" in shown and "pair" not in shown


def test_evaluate_tokenizer_alone(monkeypatch, out, tmp_path, capsys):
    os.link(out / "vqgan.pt", tmp_path / "vqgan.pt")
    call(monkeypatch, "--evaluate", "--limit", 4, "--out", tmp_path)
    shown = capsys.readouterr().out
    assert "PSNR" in shown and "cross-entropy" not in shown


# --- the text itself -----------------------------------------------------------------------------

MODULES = "vqgan prior sample data train_vqgan train_prior".split()
LINES = 2_093  # of code in them; the aim is 1,200


def test_every_symbol_of_the_paper_map_exists():
    """README's table of sections and symbols: each row names facts, and code that is there."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    table = text.split("## The paper map")[1].split("\n## ")[0]
    rows = [row.split("|")[1:-1] for row in table.splitlines() if row.startswith("|")][2:]
    rows = [row for row in rows if not row[0].strip().startswith("**")]
    assert len(rows) > 25
    for place, what, symbols, facts in rows:
        for symbol in re.findall("`(.+?)`", symbols) or pytest.fail(f"no symbol for {what}"):
            module, *path = symbol.split(".")
            assert module in MODULES, symbol
            functools.reduce(getattr, path, importlib.import_module(module))
        numbers = [int(number) for number in re.findall(r"F(\d+)", facts)]
        assert numbers and all(1 <= number <= 130 for number in numbers), what


def code_lines(source):
    """Numbers of the lines that are neither blank, nor comment, nor docstring."""
    skipped = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            found |= set(range(token.start[0], token.end[0] + 1))
    return found - skipped


def test_the_modules_stay_readable():
    """Lines of at most 100 columns, and no more code than there is: the aim for the six modules is
    not met yet, so whoever adds a line looks for two to remove."""
    count = 0
    for name in MODULES:
        source = (HERE / f"{name}.py").read_text(encoding="utf-8")
        count += len(code_lines(source))
        assert max(map(len, source.splitlines())) <= 100, name
    assert count <= LINES, f"{count} lines of code in the six modules"
