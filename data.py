"""Data: captioned scenes and their checker, pictures with captions, text tokens, the runtime.
"""
import argparse
import csv
import dataclasses
import io
import json
import math
import os
import re
import signal
import sys
import tarfile
import time
import zlib
from collections import defaultdict, namedtuple
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from itertools import groupby, product
from pathlib import Path
from posixpath import basename, dirname, join, normpath, splitext    # names of files, on any system

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# 1. Scenes
# ---------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 90, 225),
           "yellow": (245, 215, 50), "purple": (120, 40, 165), "orange": (245, 135, 25),
           "pink": (255, 125, 190), "cyan": (60, 205, 225)}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (150, 150, 150), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 2, "large": 3}    # side of an object's box, in cells
GRID = 8                            # cells along a side of the picture
NUMBERS = {"two": 2, "three": 3}
RELATIONS = {"above": ("above", "over"), "below": ("below", "under"),
             "left of": ("left of", "to the left of"), "right of": ("right of", "to the right of")}
DIRECTIONS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
# These pairs appear alone and in counts, but in no relation of the training scenes.
RARE = {("orange", "cross"), ("purple", "triangle"), ("pink", "square"), ("green", "circle")}
# What each split relates. "seen" are other scenes than "train", of the same combinations.
SPLITS = {"train": "common", "seen": "common", "combination": "held out", "pair": "rare"}
KINDS = {"one object": 0.08, "counts": 0.16, "relation": 0.76}    # shares of the scenes


def group(first, relation, second):
    """What a combination (colour, shape), relation, (colour, shape) is: "common"; "held out", the
    10 % that training never shows; "rare", with one of the RARE pairs; "equal" things, never drawn.
    "A above B" and "B below A" describe one picture and are of one group."""
    if first == second:
        return "equal"
    pictures = (first, relation, second), (second, OPPOSITE[relation], first)
    tenth = zlib.crc32(repr(min(pictures)).encode()) % 10 == 0
    return "rare" if RARE & {first, second} else "held out" if tenth else "common"


@lru_cache(maxsize=None)
def stencil(shape, side):
    """What a shape covers of its box of side x side pixels: (side, side) in [0,1], anti-aliased."""
    line = (np.arange(side * 8) + 0.5) / (side * 4) - 1    # 8 x 8 samples a pixel, from -1 to 1
    x, y, r = line[None], line[:, None], 0.875             # r leaves a margin around the shape
    far, near = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    inside = {"circle": x * x + y * y < r * r, "square": far < 0.9 * r,
              "triangle": (abs(x) < (y + r) / 2) & (y < r),
              "cross": (far < r) & (near < 0.36 * r)}[shape]
    return inside.reshape(side, 8, side, 8).mean((1, 3)).astype(np.float32)


class Scenes:
    """Endless captioned pictures of coloured shapes, a function of (seed, split, index).

    split: "train"; "seen", other scenes of the same combinations; "combination", relations of
    combinations that are held out; "pair", relations with a colour and shape that training never
    relates. size: pixels along a side, a multiple of 8; an index shows one scene at every size.
    """

    def __init__(self, split="train", size=64, seed=0):
        if size % GRID:
            raise SystemExit(f"--image-size {size}: built-in scenes need a multiple of {GRID}")
        self.split, self.size, self.seed, self.group = split, size, seed, SPLITS[split]

    def __len__(self):
        return 1_000_000    # as good as endless

    def sample(self, index, rng=None):
        """-> uint8 (size, size, 3), caption. rng is not used: a scene has no augmentation."""
        rng = np.random.default_rng((self.seed, zlib.crc32(self.split.encode()), index))
        boxes = None
        while boxes is None:
            objects, relation, background, caption = self._compose(rng)
            boxes = _place([SIZES[size] for size, _, _ in objects], relation, rng)
        return self._draw(objects, boxes, background), caption

    def captions(self, n):
        """The captions of the first n scenes: list[str]."""
        return [self.sample(index)[1] for index in range(n)]

    def _compose(self, rng):
        """-> what `read_caption` reads, with every size, and a caption."""
        def choose(choices):
            return list(choices)[rng.integers(len(choices))]

        about = rng.choice(list(KINDS), p=list(KINDS.values()))
        related = about == "relation" or self.group != "common"
        while True:
            things = [(choose(COLOURS), choose(SHAPES)) for _ in range(1 + related)]
            relation = choose(RELATIONS) if related else None
            if not related or group(things[0], relation, things[1]) == self.group:
                break
        objects = [(choose(SIZES), *thing) for thing in things]
        nouns = [" ".join(words if rng.integers(2) else words[1:]) for words in objects]
        caption = f"a {nouns[0]}"
        if related:
            caption += f" {choose(RELATIONS[relation])} a {nouns[1]}"
        elif about == "counts":
            number = choose(NUMBERS)
            caption = f"{number} {nouns[0]}{'es' if nouns[0].endswith('s') else 's'}"
            objects *= NUMBERS[number]
        background = choose(BACKGROUNDS)
        if background != "white" or rng.integers(2):    # white may go without saying
            caption += choose((" on {}", " on a {} background")).format(background)
        return objects, relation, background, caption.replace("a orange", "an orange")

    def _draw(self, objects, boxes, background):
        """Objects (size, colour, shape) in boxes (left, top), in cells -> uint8 (size, size, 3)."""
        cell = self.size // GRID
        image = np.tile(np.uint8(BACKGROUNDS[background]), (self.size, self.size, 1))
        for (size, colour, shape), (x, y) in zip(objects, boxes):
            covered = stencil(shape, SIZES[size] * cell)[..., None]
            window = image[y * cell :, x * cell :][: len(covered), : len(covered)]
            window[:] = np.round(window + covered * (np.float32(COLOURS[colour]) - window))
        return image


def _place(sides, relation, rng):
    """Left and top cells [(x, y)] of boxes that do not overlap and obey the relation, or None.

    In raster order it must be plain what comes next, or a small model cannot learn it in minutes:
    objects side by side share their top edge; equal ones stand in a row, like words on a page.
    """
    if relation is None:
        n, side, columns = len(sides), sides[0], min(len(sides), GRID // sides[0])
        gap = rng.integers((GRID - columns * side) // (columns - 1) + 1) if columns > 1 else 0
        width, height = columns * (side + gap) - gap, -(-n // columns) * side
        x, y = rng.integers(GRID - width + 1), rng.integers(GRID - height + 1)
        return [(x + i % columns * (side + gap), y + i // columns * side) for i in range(n)]
    for _ in range(40):
        boxes = [[int(rng.integers(GRID + 1 - side)) for _ in "xy"] for side in sides]
        if relation in ("left of", "right of"):
            boxes[1][1] = min(boxes[0][1], GRID - sides[1])
        centres = [(x + side / 2, y + side / 2) for (x, y), side in zip(boxes, sides)]
        if _related(*centres, relation, margin=1, least=sum(sides) / 2):
            return boxes
    return None


def _related(a, b, relation, margin=0, least=0):
    """Does centre a = (x, y) stand in `relation` to b: further along the axis than across it, by
    `margin`, and at least so far? That far apart, boxes do not overlap if `least` is their mean
    side."""
    (x, y), dx, dy = DIRECTIONS[relation], b[0] - a[0], b[1] - a[1]
    return x * dx + y * dy >= max(abs(y * dx + x * dy) + margin, least)


def read_caption(caption):
    """-> [(size or None, colour, shape), ...] with each counted object, relation or None,
    background. Raises ValueError if the caption is not one of the built-in scenes'."""
    names = {word: name for name, words in RELATIONS.items() for word in words}
    thing = rf"(?:(small|large) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?:e?s)?"
    match = re.fullmatch(rf"(an?|two|three) {thing}(?: ({'|'.join(names)}) an? {thing})?"
                         rf"(?: on (?:a )?({'|'.join(BACKGROUNDS)})(?: background)?)?", caption)
    if not match or match[1] in NUMBERS and match[5]:
        raise ValueError(f"not a caption of the built-in scenes: {caption!r}")
    number, *first, word, size, colour, shape, background = match.groups()
    objects = [tuple(first)] + [(size, colour, shape)] * bool(word)
    return objects * NUMBERS.get(number, 1), names.get(word), background or "white"


def kind(caption):
    """"one object", "counts" or "relation": what a caption of the built-in scenes is about."""
    objects, relation, _ = read_caption(caption)
    return "relation" if relation else "counts" if len(objects) > 1 else "one object"


def _regions(mask):
    """The 4-connected regions of a boolean (H,W) mask, each as a mask of its own: every pixel takes
    the largest number among itself and its neighbours, until no number moves any more."""
    labels, before = mask * np.arange(1, mask.size + 1).reshape(mask.shape), None
    while not np.array_equal(labels, before):
        before, wide = labels, np.pad(labels, 1)
        near = wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]
        labels = mask * np.maximum(labels, np.max(near, 0))
    return [labels == label for label in np.unique(labels[mask])]


def _recognise(image, background):
    """Yields (size, colour, shape, centre) of each object in a float (S,S,3) picture in 0..255:
    what must be drawn to get it. One not well formed and in one colour has the shape "malformed".
    """
    cell, plain = len(image) // GRID, np.float32(BACKGROUNDS[background])
    image = image - plain    # 0 where the background is
    tones = {name: np.float32(rgb) - plain for name, rgb in COLOURS.items()}
    for region in _regions(abs(image).max(-1) > 40):
        pixels = image[region]
        if len(pixels) < max(2, cell * cell / 16):
            continue    # noise of the tokenizer: 3 pixels of 64 x 64
        core = np.median(pixels[np.argsort(-np.square(pixels).sum(-1))[: len(pixels) // 2]], 0)
        gap, colour = min((abs(core - tone).max(), name) for name, tone in tones.items())
        cover = image @ tones[colour] / np.square(tones[colour]).sum()    # 1: colour, 0: background
        y, x = ((places.min() + places.max() + 1) / 2 for places in np.nonzero(region))
        fits = []
        for size, shape, up, over in product(SIZES, SHAPES, *[(math.floor, math.ceil)] * 2):
            drawn = stencil(shape, SIZES[size] * cell)
            top, left = up(y - len(drawn) / 2), over(x - len(drawn) / 2)
            box = np.s_[top : top + len(drawn), left : left + len(drawn)]
            if cover[box].shape == drawn.shape:    # else this size would stick out of the picture
                missed = abs(cover[box] - drawn).sum() + len(pixels) - region[box].sum()
                fits.append((missed / drawn.sum(), size, shape))
        error, size, shape = min(fits, default=(1.0, None, None))
        yield size, colour, shape if gap <= 35 and error <= 0.15 else "malformed", (x, y)


def check(image, caption):
    """Does the picture show just what the caption says: every object, its colour, shape and size
    where named, number, relation, background (white unless named), and nothing else?

    image: uint8 (S,S,3), or a tensor (3,S,S), uint8 or float in [0,1]; S a multiple of 8, at least
    56: below that neighbours touch. Decides from these two alone. Raises ValueError for a caption
    that is not one of the built-in scenes'.
    """
    if isinstance(image, torch.Tensor):
        whole = 255 if image.is_floating_point() else 1
        image = image.detach().float().mul(whole).clamp(0, 255).permute(1, 2, 0).cpu().numpy()
    wanted, relation, background = read_caption(caption)
    found = list(_recognise(image.astype(np.float32), background))
    return len(found) == len(wanted) and any(
        all(size in (None, got[0]) and (colour, shape) == got[1:3]
            for (size, colour, shape), got in zip(wanted, things))
        and (relation is None or _related(things[0][3], things[1][3], relation))
        for things in (found, found[::-1]))


# ---------------------------------------------------------------------------------------------
# 2. Real pictures
# ---------------------------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LISTS = ("metadata.jsonl", "metadata.csv")    # as Hugging Face's ImageFolder
# A file of the data: `size` bytes of `path` from `offset` on, which is inside a shard; or all of
# it. `stem` is what a picture and the captions beside it have in common: the name up to the last
# dot; in a shard, up to the first.
File = namedtuple("File", "path stem offset size", defaults=("", 0, -1))


@contextmanager
def explain(what, expected):
    """An error inside ends the program with one line: what is wrong, how, what was expected."""
    try:
        yield
    except Exception as error:    # as many kinds as there are ways to be something else
        how = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SystemExit(f"{what}: {how}; expected {expected}")


def clean(text):
    """Any str -> one that can be printed and encoded: a file name need not be UTF-8."""
    return text.encode(errors="replace").decode()


def open_image(file, draft=math.inf):
    """Any picture file -> PIL image in mode RGB, the way a viewer shows it.

    file: path or binary file object. draft: JPEGs may be decoded at 1/2, 1/4 or 1/8 size, the
    smallest with both sides >= draft; several times faster for large photographs.
    EXIF rotation is applied, transparency lies on white, 16 bits are scaled to 8, of an
    animation the first frame counts. Raises OSError, whatever is wrong with the file.
    """
    try:
        image = Image.open(file)
        image.draft(None, (draft, draft))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):    # 16 bits: PIL's own conversion would clip at 255
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:    # PIL meets damaged files with a dozen different exceptions
        raise OSError(f"{type(error).__name__}: {error}".split(" <_io")[0]) from None


def _crop(image, size, rng, offset, ratios):
    """Square at offset(slack) -> area resize to t×t, t in ratios·size -> random size×size cut.

    t never exceeds the square: the papers only shrink. A picture smaller than `size`, of which
    they say nothing, is enlarged to exactly `size`.
    """
    side = min(image.size)
    left, top = (offset(length - side) for length in image.size)
    low, high = (min(max(side, size), round(ratio * size)) for ratio in ratios)
    t = int(rng.integers(low, high, endpoint=True))
    method = Image.BOX if t <= side else Image.BICUBIC
    image = image.resize((t, t), method, (left, top, left + side, top + side))
    x, y = rng.integers(t - size + 1, size=2)
    return np.array(image)[y : y + size, x : x + size]


def tokenizer_crop(image, size, rng):
    """DALL-E's dVAE preprocessing (DALL-E A.2, Listing 1), Parti §4.1's for stage 1.

    PIL image -> uint8 (size, size, 3): random square, t in [9/8, 12/8]·size, random flip.
    """
    pixels = _crop(image, size, rng, lambda slack: rng.integers(slack + 1), (9 / 8, 12 / 8))
    return pixels[:, ::-1].copy() if rng.integers(2) else pixels


def prior_crop(image, size, rng):
    """DALL-E's transformer preprocessing (DALL-E B.2, Listing 2), Parti §4.1's for stage 2.

    PIL image -> uint8 (size, size, 3): square near the centre, t in [1, 9/8]·size. Never
    flipped, since pictures may hold writing.
    """
    return _crop(image, size, rng, lambda slack: rng.integers(
        3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8)), (1, 9 / 8))


def centre_crop(image, size, rng=None):
    """The largest central square, for evaluation: PIL image -> uint8 (size, size, 3)."""
    return _crop(image, size, np.random.default_rng(0), lambda slack: slack // 2, (1, 1))


def _read(file):
    """The bytes of a File, read only now: there may be millions."""
    return np.fromfile(file.path, np.uint8, file.size, offset=file.offset).tobytes()


def _inside(folder, name):
    """The path of the file `name` of a folder. Raises ValueError if it leads out of there."""
    if re.match(r"[/\\]|\w+:[/\\]", name) or ".." in re.split(r"[/\\]", name):
        raise ValueError(f"{name} is not a relative path without '..'")
    return normpath(join(folder, name))


def _index(path):
    """{name: File} of all files below a folder or in a .tar, sorted, without hidden ones.

    Shards are read in place: only the offsets of their members are kept, so that access is
    random and nothing is ever unpacked. A shard counts as a folder of its name.
    """
    files = {}
    found = [os.path.join(folder, base) for folder, _, bases in os.walk(path) for base in bases]
    for file in found or [str(path)]:
        name = normpath(file.removeprefix(str(path)).replace(os.sep, "/").lstrip("/"))
        files[name] = File(file, splitext(name)[0])
        if file.lower().endswith(".tar"):
            with explain(file, "a whole, uncompressed .tar"), tarfile.open(file, "r:") as shard:
                for member in shard:
                    if member.issparse() or not (member.isreg() or member.isdir()):
                        raise ValueError(f"{member.name} is a link, a device or sparse")
                    inner = _inside(name, member.name)
                    stem = re.match(r"(.*/)?[^/.]*", inner)[0]
                    files[inner] = File(file, stem, member.offset_data, member.size)
                if _read(File(file, "", shard.offset, 512)) != bytes(512):
                    raise ValueError("cut short or damaged")    # tarfile takes any end for the end
    return {name: files[name] for name in sorted(files) if "/." not in "/" + name}


def _rows(name, file):
    """The rows of a caption file, dicts: of a table, with a file_name; of a .txt, its lines."""
    ending = splitext(name)[1].lower()
    text = _read(file).decode("utf-8-sig", "replace" if ending == ".txt" else "strict")
    if text.startswith("version https://git-lfs"):
        raise ValueError("a Git-LFS pointer in the place of the file: git lfs pull")
    lines = [line for line in text.split("\n") if line.strip()]
    if ending == ".txt":
        return [{"text": line} for line in lines]
    if ending == ".jsonl":
        return [json.loads(line) for line in lines]
    if ending == ".csv":    # only the csv module can tell rows from line breaks
        return list(csv.DictReader(io.StringIO(text, newline="")))
    table = json.loads(text)    # COCO's, or a single row
    names = {image["id"]: image["file_name"] for image in table.get("images", ())}
    rows = table.get("annotations", [table])
    return [{**row, "file_name": names.get(row.get("image_id"), "")} for row in rows]


def _caption(row):
    """The caption in a row of a caption file, on one line. Raises LookupError without one."""
    text = [row[key] for key in ("text", "caption", "prompt") if key in row][0]
    return " ".join(str(text or "").split())


def _listed(names, lists, anywhere=False):
    """{picture: its captions} of those that `lists`, {name: File}, mention.

    Their paths are relative to the list, as in metadata; or `anywhere`, as in COCO captions JSON,
    to any folder of the data. Raises SystemExit with one line for a list that is none.
    """
    alike = {base: list(same) for base, same in groupby(sorted(names, key=basename), basename)}
    listed = defaultdict(list)
    for source, file in lists.items():
        with explain(source, "COCO captions JSON, or UTF-8 rows with file_name and text"):
            for row in _rows(source, file):
                path = _inside("" if anywhere else dirname(source), row["file_name"])
                found = [name for name in alike.get(basename(path), ())
                         if name == path or anywhere and name.endswith("/" + path)]
                if len(found) > 1:
                    raise ValueError(f"{path} may be {' or '.join(found)}; give --data its folder")
                for name in found:
                    listed[name].append(_caption(row))
    if not listed:
        raise SystemExit(f"{source} (COCO, metadata) names no picture of these: {names[0]} ...")
    return listed


class Pictures:
    """A folder or .tar shards of pictures: sample(index, rng), captions(n), len().

    Captions come from the first of these that there is: `captions` (COCO captions JSON);
    metadata.jsonl or metadata.csv at any depth (as Hugging Face's ImageFolder); x.txt, each line
    a caption, or x.json beside x.png; the name of the picture's folder. Pictures that the first
    two do not list are left out.

    split: "train", or anything else for the 2 % of pictures that are held out, chosen by a
    hash of their names. Raises SystemExit with one line if the data are not as described.
    """

    def __init__(self, path, captions=None, size=256, crop=tokenizer_crop, split="train"):
        self.size, self.crop, self.files = size, crop, _index(path)
        names = [name for name in self.files if name.lower().endswith(EXTENSIONS)]
        if not names:
            raise SystemExit(f"--data {path}: no picture there; expected a folder or a .tar file "
                             f"that exists, with {' '.join(EXTENSIONS)}")
        lists = {str(captions): File(captions)} if captions else {
            name: file for name, file in self.files.items() if basename(name) in LISTS}
        beside = {file.stem: name for name, file in self.files.items()
                  if name.lower().endswith((".txt", ".json"))}    # sorted: .txt wins over .json
        # {picture: its captions, or the name of the file beside it that holds them}
        self.texts = {name: beside.get(self.files[name].stem, []) for name in names}
        if lists:
            self.texts = _listed(names, lists, anywhere=bool(captions))
        elif not any(self.texts.values()):
            self.texts = {name: [_folder(name)] for name in names}
        train = {name for name in self.texts if zlib.crc32(os.fsencode(name)) % 50}
        chosen = train if split == "train" else self.texts.keys() - train
        self.names = sorted(chosen or self.texts)    # too few cannot be split

    def __len__(self):
        return len(self.names)

    def sample(self, index, rng):
        """-> uint8 (size, size, 3), caption. Raises OSError for a file that is bad or gone."""
        name = self.names[index]
        # 3/2·size is the largest t of tokenizer_crop: decoding at no less loses nothing.
        image = open_image(io.BytesIO(_read(self.files[name])), round(1.5 * self.size))
        captions = self._captions(name)
        return self.crop(image, self.size, rng), captions[rng.integers(len(captions))]

    def captions(self, n):
        """At most n captions, spread evenly over all: list[str]."""
        names = spread(self.names, n)
        return spread([caption for name in names for caption in self._captions(name)], n)

    def _captions(self, name):
        """All captions of a picture: at least one, which may be empty."""
        texts = self.texts[name]
        if isinstance(texts, str):
            try:
                texts = [_caption(row) for row in _rows(texts, self.files[texts])]
            except Exception:    # a .json without a caption, or no JSON
                texts = []
        return [clean(text) for text in texts] or [""]


def spread(items, n):
    """At most n items of a list, spread evenly over it."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def _folder(name):
    """The caption in the name of a picture's folder; numbers and shards, as in 00000, are none."""
    folder = basename(dirname(name))
    return "" if re.fullmatch(r"(?i)[\W\d_]*|.*\.tar", folder) else folder.replace("_", " ")


def open_data(path, captions=None, size=256, crop=tokenizer_crop, split="train", seed=0):
    """The data of --data and --captions: built-in scenes if path is empty, else Pictures."""
    if captions and not path:
        raise SystemExit(f"--captions {captions} needs --data, the folder of its pictures")
    return Pictures(path, captions, size, crop, split) if path else Scenes(split, size, seed)


def save_grid(path, rows, labels=None):
    """Write rows of pictures (n,3,H,W) in [0,1] as one PNG, each row above its label, if any.

    Small pictures are shown enlarged, pixel by pixel. The file appears whole or not at all.
    """
    rows = [row.detach().float().clamp(0, 1).mul(255).round().byte().cpu() for row in rows]
    sheet = nn.utils.rnn.pad_sequence(rows, True, 255)                          # (R,n,3,H,W)
    zoom, foot = max(1, 128 // sheet.shape[-1]), 18 if labels else 0
    sheet = sheet.repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
    sheet = nn.functional.pad(sheet, (2, 2, 2, 2 + foot), value=255)            # (R,n,3,h,w)
    sheet = sheet.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)            # (R·h,n·w,3)
    sheet = Image.fromarray(sheet.numpy())
    for y, label in enumerate(labels or (), 1):
        ImageDraw.Draw(sheet).text((3, y * sheet.height // len(rows) - foot), label, "black")
    sheet.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


# ---------------------------------------------------------------------------------------------
# 3. Text
# ---------------------------------------------------------------------------------------------

PAD, UNKNOWN, BOS, EOS = range(4)


def train_tokens(captions, pieces=16_000):
    """A SentencePiece vocabulary (Parti §2.2: 16,000) from list[str] -> its bytes.

    BPE, which makes words of few captions too. Case is folded. What the vocabulary lacks is
    spelt in UTF-8 bytes, so that no text is unknown. Few captions give fewer pieces. Raises
    SystemExit if no caption has any text.
    """
    captions = [caption[:1000] for caption in captions if caption.strip()]
    model = io.BytesIO()
    with explain(f"--pieces {pieces} from {len(captions)} captions with text", "more pieces; or "
                 "captions: --captions, metadata, .txt beside the pictures, names of folders"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=model, vocab_size=pieces,
            model_type="bpe", hard_vocab_limit=False, byte_fallback=True, num_threads=1,
            normalization_rule_name="nmt_nfkc_cf", minloglevel=2,
            pad_id=PAD, unk_id=UNKNOWN, bos_id=BOS, eos_id=EOS)
    return model.getvalue()


class Text:
    """list[str] -> (B,T) int64: token ids, EOS, then padding 0. "" is padding alone: no condition.

    model: the bytes of `train_tokens`. `vocab` is the number of ids; `truncated` counts the
    captions that were cut to T = length tokens (Parti §2.2: 128), which is said now and then.
    """

    def __init__(self, model, length=128):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.length, self.vocab, self.truncated = length, self.pieces.vocab_size(), 0

    def __call__(self, captions):
        ids = torch.full((len(captions), self.length), PAD)    # (B,T)
        for row, caption, tokens in zip(ids, captions, self.pieces.encode(list(captions))):
            kept = tokens[: self.length - 1] + [EOS] if tokens else []
            row[: len(kept)] = torch.tensor(kept)
            if len(tokens) >= self.length:
                self.truncated += 1
                if math.log10(self.truncated).is_integer():    # the 1st, 10th, 100th ...
                    say(f"long texts cut, so far: {self.truncated}, such as {caption[:60]!r}")
        return ids


# ---------------------------------------------------------------------------------------------
# 4. Stream: the order of the data is a function of (seed, position) and of nothing else
# ---------------------------------------------------------------------------------------------

@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    """The order of n pictures in an epoch, a permutation of 0 .. n-1."""
    return np.random.default_rng((seed, epoch, 1)).permutation(n)


class Stream(torch.utils.data.Dataset):
    """Endless: position -> uint8 (3,S,S), caption, and a line for each bad file met instead.

    The generator of a sample, for augmentation and for caption dropout, is seeded by (seed,
    position), so neither workers nor processes nor a resume change anything, and no state has to
    be saved. drop: probability of an empty caption. After 100 bad files the picture is black.
    """

    def __init__(self, dataset, seed, drop=0.0):
        self.dataset, self.seed, self.drop = dataset, seed, drop

    def __getitem__(self, position):
        rng, bad = np.random.default_rng((self.seed, position)), ""
        for later in range(position, position + 100):    # a bad file gives way to the next one
            epoch, place = divmod(later, len(self.dataset))
            index = later    # of scenes, which never repeat
            if not isinstance(self.dataset, Scenes):
                index = shuffled(len(self.dataset), self.seed, epoch)[place]
            try:
                pixels, caption = self.dataset.sample(index, rng)                 # (S,S,3)
                caption = "" if rng.random() < self.drop else caption
                return torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), caption, bad
            except OSError as error:
                bad += clean(f"{self.dataset.names[index]}: {error}\n")
        return torch.zeros(3, self.dataset.size, self.dataset.size).byte(), "", bad


def _deaf(worker):
    """Ctrl-C reaches the workers too; they must go on until the main process has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(dataset, batch, seed, start, steps, rank=0, world=1, workers=0, drop=0.0, text=None):
    """Yields this process's slice of the global batches of the steps start .. steps-1.

    -> uint8 (batch/world,3,S,S), and text(captions) (b,T) int64, or the list of captions if text
    is None. drop: probability of an empty caption. Bad files are named once; SystemExit lists
    them when they are more than 2 % (of the data; of what was read so far, from 10,000 on), or
    100 in a row.
    """
    share = slice(batch * rank // world, batch * (rank + 1) // world)
    positions = (range(step * batch, (step + 1) * batch)[share] for step in range(start, steps))
    loader = torch.utils.data.DataLoader(
        Stream(dataset, seed, drop), batch_sampler=positions, num_workers=workers,
        worker_init_fn=_deaf, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())    # its own: loading must not disturb torch's random state
    named, met = vars(dataset).setdefault("bad", set()), set()    # named once in all streams
    for step, (images, captions, bad) in enumerate(loader, 1):
        met.update("".join(bad).splitlines())
        for line in met - named:
            named.add(line)
            tqdm.write(f"skipped a bad picture ({len(named)} so far): {line}")
        read = max(step * len(captions), 10_000)
        if met and (len(met) > 0.02 * min(len(dataset.texts), read)    # of all, held out or not
                    or max(lines.count("\n") for lines in bad) >= 100):
            those = "; ".join(sorted(met)[:100])
            raise SystemExit(f"more than 2 % of the pictures are bad; repair or remove {those}")
        yield images, text(captions) if text else list(captions)


# ---------------------------------------------------------------------------------------------
# 5. Runtime: options, processes, checkpoints, logs, the training loop of both stages
# ---------------------------------------------------------------------------------------------

def option(default, help, **more):
    """A field of a dataclass that `parse` turns into an option. more: choices; most and least, the
    bounds of a number, where the least is not 0, nor 1 for a whole one with a default above 0."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a run does and where, beside the sizes of the model and the recipe."""
    data: str = option("", "folder or .tar; empty: built-in scenes")
    preset: str = option("", "sizes and recipe; empty: tiny, and the papers' with --data")
    out: str = option("out/", "folder of checkpoints, logs and pictures")
    workers: int = option(0, "processes that load data")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("auto", "auto, float32 or bfloat16")
    compile: bool = False
    fresh: bool = option(False, "start over")
    wandb: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: what both stages share. The papers' values stand in the scripts."""
    steps: int
    batch: int = option(256, "pictures per step, over all processes")
    accumulate: int = option(1, "parts that a batch is computed in")
    lr: float
    warmup: int = option(0, "steps in which the rate grows to lr", least=0)
    schedule: str = option("cosine", "of the rate", choices=("cosine", "exponential", "linear"))
    decay_from: int = option(0, "step at which the rate begins to fall", least=0)
    final: float = option(0.5, "last rate as a fraction of lr")
    weight_decay: float
    clip: float = option(math.inf, "largest norm of the gradient", most=math.inf)
    seed: int = option(0, "of weights, data and dropout")
    log_every: int = 10
    save_every: int = option(5_000, "steps; evaluates, too")

    def rate(self, step):
        """The learning rate of update `step`, counted from 1: linear warm-up, then "cosine"
        (ViT-VQGAN §5.1), or flat to decay_from and then "exponential" (Parti §3) or "linear"."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        begin = max(self.warmup, self.decay_from)
        progress = min(max(step - begin, 0) / max(self.steps - begin, 1), 1.0)
        if self.schedule == "exponential":
            return self.lr * self.final**progress
        # What is left of the way down, from 1 to 0.
        left = (1 + math.cos(math.pi * progress)) / 2 if self.schedule == "cosine" else 1 - progress
        return self.lr * (self.final + (1 - self.final) * left)


NONE = {"tiny": dataclasses.make_dataclass("Nothing", ())()}    # presets of what has no sizes


def parse(description, options, presets=NONE, recipes=NONE, large="tiny", argv=None, derived=()):
    """Command line -> [options, config, recipe], each a dataclass; one option per field.

    options: dataclass with defaults, holding at least `data` and `preset` if there are presets.
    presets, recipes: {name: dataclass} with "tiny" among the names; `large` names the preset
    that --data brings. derived: fields that are no options. What is given explicitly overrides
    the preset. Raises SystemExit with one line, also for numbers out of range, see `option`.
    """
    def fail(message):
        raise SystemExit(f"{message}; --help lists the options")

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="In brackets: the default, or that of preset tiny.")
    parser.error = fail
    fields = {field.name: (getattr(part, field.name), field.metadata)
              for part in (presets["tiny"], recipes["tiny"], options)
              for field in dataclasses.fields(part) if field.name not in derived}
    for name, (default, more) in fields.items():
        flag, how = "--" + name.replace("_", "-"), {"type": type(default)}
        if isinstance(default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):    # words, before, between and after the options
            flag, how = name, {"nargs": "*"}
        choices = presets if name == "preset" else more.get("choices")
        parser.add_argument(flag, default=argparse.SUPPRESS, choices=choices, **how,
                            help=f"{more.get('help', '')} [{default}]".strip())
    given = vars(parser.parse_intermixed_args(argv))
    for name, value in given.items():
        default, more = fields[name]
        least = more.get("least", int(isinstance(default, int) and default > 0))
        most = more.get("most", 10**12)    # torch's seeds are 64 bits, and ours a million seeds
        if type(value) in (int, float) and not least <= value <= most:
            fail(f"--{name.replace('_', '-')} {value}: expected a number from {least} to {most}")
    preset = given.setdefault("preset", large if given.get("data") else "tiny")
    with explain("these sizes", "ones that fit; --help lists the options"):
        return [dataclasses.replace(part, **{key: given[key] for key in vars(part) & given.keys()})
                for part in (options, presets[preset], recipes[preset])]


def say(message):
    """Print a line above the progress bar, once however many processes there are."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)


def pick(device="auto", dtype="auto", width=0):
    """--device and --dtype -> (torch.device, torch.dtype): the fastest correct choice.

    width: of the matrices. On a CPU bfloat16 pays for wide ones alone (the tiny prior's step takes
    1.5 times as long), and only with instructions for it.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))    # each process has a GPU of its own
    cards = torch.cuda.device_count()
    here = ["cuda"] * (cards > 0) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = here[0] if device == "auto" else device
    if name not in here or dtype not in ("auto", "float32", "bfloat16"):
        raise SystemExit(f"--device {device} --dtype {dtype}: expected on this machine auto, "
                         f"{', '.join(here)}; and auto, float32, bfloat16")
    if name == "cuda" and local >= cards:
        raise SystemExit(f"process {local} has no GPU: give --nproc-per-node {cards} at most")
    fast = name == "cpu" and width >= 512 and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    if name == "cuda":
        torch.cuda.set_device(local)
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    short = dtype == "bfloat16" or dtype == "auto" and fast
    return torch.device(name), torch.bfloat16 if short else torch.float32


# What torch's own errors say, and what to do about them.
ADVICE = {"allocate": "out of memory: lower --batch or --n, raise --accumulate, or choose smaller "
                      "sizes",
          "compiler": "--compile needs a compiler of C++: install one, or leave the option out"}


def launch(main):
    """Run main(). When processes fail together, the first alone says why; all exit with 1.

    The first is found by the store of torchrun, which outlives the processes that it started.
    """
    try:
        main()
    except BaseException as error:
        if dist.is_torchelastic_launched():
            store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
            if store.add("failed", 1) > 1:
                sys.exit(1)
        if isinstance(error, (KeyboardInterrupt, OSError)):    # a full disk, for instance
            raise SystemExit(f"stopped ({str(error) or 'Ctrl-C'}); what was saved is whole, and "
                             "the same command continues")
        for word, advice in ADVICE.items():
            if isinstance(error, Exception) and word in str(error):
                raise SystemExit(f"{advice} ({str(error).splitlines()[0]})")
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


def average(tensor):
    """The mean of a tensor, which is overwritten, over all processes; all call it together."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor


WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)    # loads into any layout
OPTIMIZERS = {"model": "optimizer", "discriminator": "discriminator_optimizer"}    # their keys


class Run:
    """One training run: its processes, its checkpoint out/NAME.pt, its log out/NAME.csv, its loop.

    .rank .world .main (is this rank 0?) .device .dtype .autocast .saved (the checkpoint to continue
    from, or None; `together` frees it) .start (steps done before) .content (what each checkpoint
    holds besides step, networks and optimizers) .stopping .skipped (steps that were not finite).
    Plain `python` is one process; torchrun brings more (gloo on CPU, NCCL on CUDA). Order: Run,
    `resume`, `together`, `train`; all processes call them together. read: path, dict -> dict, or
    SystemExit if the file is damaged or none.
    """

    def __init__(self, options, recipe, name, width, read):
        self.options, self.recipe, self.name = options, recipe, name
        self.device, self.dtype = pick(options.device, options.dtype, width)
        self.autocast = torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if recipe.batch % (self.world * recipe.accumulate):
            raise SystemExit(f"--batch {recipe.batch}: expected a multiple of {self.world} "
                             f"processes times --accumulate {recipe.accumulate}")
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.path, self.previous, self.temporary, self.csv = (
            Path(options.out, name + ending) for ending in (".pt", ".prev.pt", ".pt.tmp", ".csv"))
        self.start = self.skipped = self.in_a_row = self.logged = 0
        self.stopping, self.tracker = False, None
        with explain(f"--out {options.out}", "a folder to write into; for --wandb the package, pip "
                     "install wandb, and a login"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.temporary.touch()    # or it is there already: a kill left it
            self.temporary.unlink(missing_ok=True)
            if options.wandb and self.main:
                import wandb
                self.tracker = wandb.init(project="parti", name=name, dir=options.out)
        # A kill between the two renames of `save` leaves only the previous checkpoint.
        path = self.path if self.path.exists() else self.previous
        found = torch.tensor(float(path.exists() and not options.fresh), device=self.device)
        self.saved = read(path, dict) if average(found) else None    # by all, or by none

    def resume(self, config, *fixed, **more):
        """Say what is continued, and from here on let SIGTERM and Ctrl-C only set .stopping.

        config: a plain dict. SystemExit for a checkpoint with other values of its fields, of `more`
        or of the fields of the recipe in `fixed`; that others have changed is pointed out.
        """
        self.content = {"config": config, "recipe": dataclasses.asdict(self.recipe), **more}
        if self.saved:
            here = config | self.content["recipe"] | more
            # What a checkpoint does not say of `more` is taken to be the same.
            there = more | self.saved | self.saved.get("config", {}) | self.saved.get("recipe", {})
            names = [name for name in here if there.get(name) != here[name]]
            wrong = [name for name in names if name in {*config, *fixed, *more}]
            changed = "; ".join(f"{x} {there.get(x)} there, {here[x]} here" for x in wrong or names)
            if wrong:
                raise SystemExit(f"{self.path} has another configuration ({changed}); use the same "
                                 "options and files, another --out, or --fresh")
            self.start, steps = self.saved.get("step", 0), self.recipe.steps
            self.skipped = self.saved.get("skipped", 0)
            how = "finished; --fresh starts over" if self.start >= steps else "continuing"
            say(f"{self.path}: {how}, step {self.start} of {steps} ({changed or 'same recipe'})")
        if self.main and self.csv.exists() and not self.saved:
            os.replace(self.csv, self.csv.with_suffix(".prev.csv"))
        elif self.main and self.csv.exists():
            content = self.csv.read_bytes()
            os.truncate(self.csv, content.rfind(b"\n") + 1)    # a kill may have torn the last row
            self.logged = int([0, *re.findall(rb"^(\d+),.*\n", content, re.MULTILINE)][-1])
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "stopping", True))

    def together(self, networks, make_optimizer):
        """-> the networks, for all processes to train together (DDP); call them only through these.

        networks: {key in the checkpoint: network, sharded or whole}; they continue where the
        checkpoint stands. make_optimizer(network, recipe) -> its optimizer. SystemExit if they are
        not those of the checkpoint.
        """
        self.parts = {}
        for key, network in networks.items():
            optimizer = make_optimizer(network.to(self.device), self.recipe)
            if self.saved:
                with explain(f"{self.path} cannot be continued, its {key} or the optimizer differs",
                             "those of this command: another --out, or --fresh"):
                    if self.saved[key].keys() != network.state_dict().keys():    # DCP would not say
                        raise ValueError("other weights")
                    dcp.set_state_dict(network, optimizer, model_state_dict=self.saved[key],
                                       optim_state_dict=self.saved[OPTIMIZERS[key]], options=WHOLE)
            if self.options.compile and key == "model":    # a critic needs second derivatives
                network.compile()
            if self.world > 1 and not isinstance(network, dist.fsdp.FSDPModule):
                network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
            self.parts[key] = network, optimizer
        self.saved = None    # training needs the memory
        return [network for network, _ in self.parts.values()]

    def log(self, step, row):
        """Append {name: number} to the log, on rank 0. A step that is there already is left alone.

        The first row decides the columns: give all of them, None where there is no value.
        """
        if not self.main or step <= self.logged:
            return
        self.logged = step
        with open(self.csv, "a+", encoding="utf-8", newline="") as file:
            file.seek(0)
            columns = next(csv.reader(file), None)
            writer = csv.DictWriter(file, columns or ["step", *row], extrasaction="ignore")
            if not columns:
                writer.writeheader()
            writer.writerow({"step": step, **row})
        if self.tracker:
            self.tracker.log(row, step=step)

    def save(self, step, state):
        """Write .content, the step and a dict of plain values and tensors, on rank 0. At every
        moment the path or the previous one is a whole checkpoint, flushed to disk: about a second
        per gigabyte. SystemExit if the disk is full; what was saved before is still there."""
        if not self.main:
            return
        try:
            with open(self.temporary, "wb") as file:
                torch.save(self.content | {"step": step, "skipped": self.skipped} | state, file)
                file.flush()
                os.fsync(file.fileno())
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(self.temporary, self.path)
        except (OSError, RuntimeError) as error:
            self.temporary.unlink(missing_ok=True)
            raise SystemExit(f"{self.path} was not saved ({error}): make room; the one before is "
                             "still there, and the same command continues")

    def agree(self, finite):
        """Tensor or bool -> (is it true on all processes?, has any been told to stop?).

        The one all-reduce that a step needs besides its gradients. Counts the steps that are
        not finite; SystemExit after 20 in a row.
        """
        flags = torch.tensor([not finite, self.stopping], dtype=torch.float32, device=self.device)
        bad, stop = average(flags).bool().tolist()
        self.skipped += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if self.in_a_row == 20:
            raise SystemExit("20 steps in a row were not finite, and changed nothing: lower --lr, "
                             f"or --dtype float32, and continue {self.path}, if it was saved yet")
        return not bad, stop

    def train(self, stream, losses_of, evaluate, measures):
        """The loop of both stages, from .start to the recipe's last step or until told to stop.

        stream: yields a tuple of tensors for each step, this process's share of a batch.
        losses_of(step, *part of that share) yields {name: scalar tensor} to log, for one network
        after the other; the first of the dict is differentiated before it goes on (a GAN has two).
        evaluate(step) -> {name: number} for the names in `measures`, on all processes together,
        before each save. The norm that is logged is the first network's.
        """
        recipe, shown, began = self.recipe, {}, time.perf_counter()
        networks, optimizers = zip(*self.parts.values())
        count = sum(p.numel() for p in networks[0].parameters())
        say(f"{self.name}, preset {self.options.preset}: {count:,} parameters, {recipe.steps} steps"
            f" of {recipe.batch} pictures, {self.world} x {self.device}, {self.dtype}")
        bar = tqdm(stream, self.name, recipe.steps, initial=self.start, disable=not self.main)
        for step, batch in enumerate(bar, self.start + 1):
            torch.manual_seed(1_000_003 * recipe.seed + 1009 * step + self.rank)    # dropout

            # Gradients add up over the parts; processes exchange them with the last one alone.
            losses = {}
            for i, part in enumerate(zip(*(x.chunk(recipe.accumulate) for x in batch)), 1):
                todo = losses_of(step, *part)
                for network in networks:
                    network.require_backward_grad_sync = i == recipe.accumulate    # DDP's no_sync
                    if isinstance(network, dist.fsdp.FSDPModule):
                        network.set_requires_gradient_sync(i == recipe.accumulate)
                    with self.autocast:
                        found = next(todo)
                    (next(iter(found.values())) / recipe.accumulate).backward()
                    for name, loss in found.items():
                        losses[name] = losses.get(name, 0) + loss.detach() / recipe.accumulate
            norms = [nn.utils.clip_grad_norm_(net.parameters(), recipe.clip) for net in networks]
            norms = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in norms]    # FSDP
            finite, stop = self.agree(torch.stack([*norms, *losses.values()]).isfinite().all())
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(step)
                if finite:
                    optimizer.step()
                optimizer.zero_grad()

            # Once in a while: evaluate, log, save; the log first, lest a kill lose its row.
            seconds = time.perf_counter() - began
            if self.device.type == "cpu" and step == self.start + 20:
                say(f"about {seconds / 20 * (recipe.steps - step) / 60:.1f} minutes left")
            due = step == recipe.steps or step % recipe.save_every == 0
            if due or step % recipe.log_every == 0:
                means = average(torch.stack([*losses.values()])).tolist()
                row = dict(zip(losses, means), grad_norm=norms[0].item(), lr=recipe.rate(step),
                           skipped=self.skipped, seconds=round(seconds, 1))
                health = evaluate(step) if due else dict.fromkeys(measures)
                self.log(step, row | health)
                shown |= {key: f"{x:.4g}" for key, x in health.items() if x is not None}
                bar.set_postfix({key: f"{row[key]:.3g}" for key in ("loss", "grad_norm")} | shown)
            if due or stop:
                state = {}
                for key, part in self.parts.items():
                    state[key], state[OPTIMIZERS[key]] = dcp.get_state_dict(*part, options=WHOLE)
                self.save(step, state)
            if stop:
                break
