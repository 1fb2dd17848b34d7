"""Data: captioned scenes and their checker, pictures with captions, text tokens, the stream of
batches; last, the small runtime that both training scripts share.
"""
import argparse
import atexit
import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import sys
import tarfile
import zlib
from collections import defaultdict, namedtuple
from functools import lru_cache
from posixpath import basename, dirname, join, normpath, splitext    # names of files, on any system

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm


def clean(text):
    """Any str -> one that can be printed and encoded: a file's name need not be UTF-8."""
    return text.encode(errors="replace").decode()


def say(message):
    """Print a line, above the progress bar if there is one; the first process alone does."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(clean(message))


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
# These pairs appear alone and in counts, but in no relation of the training scenes.
RARE = {("orange", "cross"), ("purple", "triangle"), ("pink", "square"), ("green", "circle")}
SPLITS = ("train", "seen", "pair")    # "seen": other scenes of the kind of train; "pair": of RARE
KINDS = {"one object": 0.08, "counts": 0.16, "relation": 0.76}    # shares of the scenes


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

    split: "train"; "seen", other scenes of the same kind; "pair", relations with a RARE colour and
    shape, which training never relates. size: pixels along a side, a multiple of 8; an index shows
    one scene at every size.
    """

    def __init__(self, split="train", size=64, seed=0):
        if size % GRID or split not in SPLITS:
            raise ValueError(f"scenes {split!r}, {size}: expected {SPLITS}, a multiple of {GRID}")
        self.split, self.size, self.seed, self.bad = split, size, seed, set()
        self.summary = f"built-in scenes, split {split}"    # what there is, in one line

    def __len__(self):
        return 1_000_000    # as good as endless

    def captions(self, n):
        """The captions of the first n scenes, or of 2,000, which use all words: list[str]."""
        return [self.sample(index)[1] for index in range(min(n, 2_000))]

    def sample(self, index, rng=None):
        """-> uint8 (size, size, 3), caption. rng is not used: a scene has no augmentation."""
        rng = np.random.default_rng((self.seed, zlib.crc32(self.split.encode()), index))
        boxes = None
        while boxes is None:
            objects, relation, background, caption = self._compose(rng)
            boxes = _place([SIZES[size] for size, _, _ in objects], relation, rng)
        return self._draw(objects, boxes, background), caption

    def _compose(self, rng):
        """-> what `read_caption` reads, with every size, and a caption."""
        def choose(choices):
            return list(choices)[rng.integers(len(choices))]

        about, rare = rng.choice(list(KINDS), p=list(KINDS.values())), self.split == "pair"
        related = about == "relation" or rare
        things = []
        while not things or related and (things[0] == things[1] or rare == RARE.isdisjoint(things)):
            things = [(choose(COLOURS), choose(SHAPES)) for _ in range(1 + related)]
        relation = choose(RELATIONS) if related else None
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


def pixels(image):
    """Tensor (3,H,W), uint8 or float in [0,1] -> uint8 array (H,W,3)."""
    if image.is_floating_point():
        image = image.detach().float().clamp(0, 1).mul(255).round().byte()
    return image.permute(1, 2, 0).cpu().numpy()


def _locate(near, shape, side):
    """Where `near` (S,S), 1 in an object's colour and 0 in the background's, is most like a shape
    of side x side pixels -> squared error there as a share of the shape's, top, left, side."""
    drawn = torch.from_numpy(stencil(shape, side))
    # The sum of (near - drawn)² at every place, but for that of drawn², which is the same.
    maps, kernel = torch.stack([near**2, near]), torch.stack([drawn**0, -2 * drawn])
    errors = F.conv2d(maps[None], kernel[None])[0, 0] / drawn.square().sum()
    top, left = divmod(int(errors.argmin()), errors.shape[1])
    return float(errors.min()), top, left, side


def check(image, caption):
    """Does the picture show just what the caption says: every object, its colour, shape and size
    where named, number, relation, background (white unless named), and nothing else?

    Each object is looked for where the picture is most like it, and taken away; in the end,
    nothing may be left. image: uint8 (S,S,3), or a tensor (3,S,S), uint8 or float in [0,1]; S a
    multiple of 8, at least 56: below that neighbours touch. Decides from these two alone. Raises
    ValueError for a caption that is not one of the built-in scenes'.
    """
    objects, relation, background = read_caption(caption)
    image = pixels(image) if isinstance(image, torch.Tensor) else image
    plain, cell, centres = np.float32(BACKGROUNDS[background]), len(image) // GRID, []
    image = image.astype(np.float32) - plain                                # 0: background
    for size, colour, shape in objects:
        tone = np.float32(COLOURS[colour]) - plain
        near = torch.from_numpy(1 - np.linalg.norm(image - tone, axis=-1) / np.linalg.norm(tone))
        sizes = [size] if size else SIZES
        _, top, left, side = min(_locate(near, shape, SIZES[name] * cell) for name in sizes)
        box, drawn = np.s_[top : top + side, left : left + side], stencil(shape, side)
        wrong = abs(image[box] @ tone / (tone @ tone) - drawn).sum() / drawn.sum()
        shade = abs(np.median(image[box][drawn > 0.9], 0) - tone).max()
        if wrong > 0.15 or shade > 35:
            return False
        image[box] = 0
        centres.append((left + side / 2, top + side / 2))
    # Noise of the tokenizer covers less than a quarter of any square of half a cell.
    left = torch.from_numpy(abs(image).max(-1) > 40).float()
    clear = F.avg_pool2d(left[None], cell // 2, stride=1).max() < 0.25
    return bool(clear) and (relation is None or _related(*centres, relation))


# ---------------------------------------------------------------------------------------------
# 2. Real pictures
# ---------------------------------------------------------------------------------------------

ENDINGS = tuple(Image.registered_extensions())    # all that Pillow registers, readable or not
# In a list of captions: the keys, or columns, of a picture's path and of its captions.
PATH = re.compile(r"(file|image)_?(name|path)|image|path", re.IGNORECASE)
CAPTION = re.compile(r"(text|caption|prompt)s?(_?\d+)?", re.IGNORECASE)
MAY_BE_LIST = re.compile(r"/(?!license|readme)[^/]*\.(jsonl?|csv|tsv|txt)$", re.IGNORECASE)
LISTS = ".jsonl", ".csv", ".tsv", ".txt"
csv.field_size_limit(2**31 - 1)    # long lines of a file that is no list are no error
EXPECTED = 'rows like {"file_name": "a/1.png", "text": "a caption"} in a .jsonl or .csv, in UTF-8'
# A file of the data: all of `path`, or of a shard, the `size` bytes from `offset` on.
File = namedtuple("File", "path offset size", defaults=(0, -1))


def open_image(file, draft=math.inf):
    """Any picture file -> PIL image in mode RGB, the way a viewer shows it.

    file: path or binary file object. draft: JPEGs may be decoded at 1/2, 1/4 or 1/8 size, the
    smallest with both sides >= draft; several times faster for large photographs.
    EXIF rotation is applied, transparency lies on white, of an animation the first frame counts.
    Where values are no bytes, white is the first of 1, 255, 4,095 (a camera's 12 bits) and 65,535
    that none exceeds. Raises OSError, whatever is wrong with the file.
    """
    try:
        image = Image.open(file)
        image.draft(None, (draft, draft))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":    # Pillow would clip at 255
            values = np.asarray(image, np.float32).clip(0)
            tops = [top for top in (1, 255, 4095, 65535, values.max()) if top >= values.max()]
            image = Image.fromarray((values / tops[0] * 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:    # Pillow meets damaged files with a dozen different exceptions
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


def _index(path):
    """{name: File} of all files below a folder or in a .tar, sorted, without hidden ones.

    Links are followed, each folder is read once. Shards are read in place: only the offsets of
    their members are kept, so access is random and nothing is unpacked. A shard counts as a folder
    of its name.
    """
    files, seen, paths = {}, set(), []
    for folder, folders, bases in os.walk(path, followlinks=True):
        folders.sort()
        if os.path.realpath(folder) in seen:    # links may form a loop
            folders[:], bases = [], []
        seen.add(os.path.realpath(folder))
        paths += [os.path.join(folder, base) for base in bases]
    for file in paths or [str(path)]:
        name = os.path.relpath(file, path).replace(os.sep, "/")
        if not file.lower().endswith(".tar"):
            files[name] = File(file)
            continue
        try:
            with tarfile.open(file, "r:") as shard:
                for member in shard:
                    inner = normpath(join(name, member.name))
                    files[inner] = File(file, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"{file}: {error}; expected a whole .tar, not compressed") from None
    return {name: files[name] for name in sorted(files) if "/." not in "/" + name}


def _read(file):
    """The bytes of a File. Raises OSError if it cannot be read."""
    return np.fromfile(file.path, np.uint8, file.size, offset=file.offset).tobytes()


def _rows(name, text):
    """A file of captions -> its rows, {column: value}. Raises what reading it raises."""
    if name.endswith(".json"):    # COCO's
        table = json.loads(text)
        images = {image["id"]: image for image in table["images"]}
        return [images[row["image_id"]] | row for row in table["annotations"]]
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    comma = max(",;\t", key=text.partition("\n")[0].count)
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=comma, restkey="surplus",
                               skipinitialspace=True))


def _folder(name):
    """The caption in the name of a picture's folder; numbers and shards, as in 00000, are none."""
    folder = basename(dirname(name))
    return "" if re.fullmatch(r"(?i)[\W\d_]*|.*\.tar", folder) else folder.replace("_", " ")


def _captions(files, pictures, lists):
    """-> {picture: captions}, the files that these were read from, and the paths in lists that are
    no picture's. Raises ValueError for what is not clear.

    A row means the picture that its path leads to, or else the one whose path ends like it.
    """
    texts, used, lost = defaultdict(list), set(), []
    alike, beside = defaultdict(list), defaultdict(list)
    for name in pictures:
        alike[basename(name)].append(name)
        # In a shard, what names have in common ends at the first dot.
        stem = splitext(name)[0] if files[name].size < 0 else re.match("(.*/)?[^/.]*", name)[0]
        beside[stem + ".txt"].append(basename(name))
    for source, file in lists.items():
        text = _read(file).decode("utf-8-sig", "surrogateescape")
        try:
            own = [{"path": path, "text": text.splitlines()} for path in beside.get(source, ())]
            rows = own or _rows(source.lower(), text)
            if not rows or not any(map(PATH.fullmatch, rows[0])):    # another table
                continue
            used.add(source)
            text.encode()    # an error if it is not in UTF-8
            for number, row in enumerate(rows, 1):
                paths = [row[key] for key in row if PATH.fullmatch(key)]
                captions = [row[key] for key in row if CAPTION.fullmatch(key)]
                if not paths or not captions or "surplus" in row:
                    raise ValueError(f"row {number} has {', '.join(row)}")
                path = paths[0].replace("\\", "/")
                exact, near = normpath(join(dirname(source), path)), alike[basename(path)]
                found = [name for name in near if f"/{name}".endswith(f"/{path}")]
                found = [exact] if exact in near else found
                if len(found) > 1:
                    raise ValueError(f"{path} may be {' or '.join(found)}; write more of it")
                if not found:
                    lost.append(path)
                for name in found:
                    texts[name] += captions
        except Exception as error:    # as many kinds as there are ways to be no list
            raise ValueError(f"{source}: {error}; expected {EXPECTED}") from None
    if used and used <= beside.keys():    # texts beside some pictures leave no other out
        texts = {name: texts[name] for name in pictures}
    return texts, used, lost


class Pictures:
    """A folder or .tar shards of pictures: sample(index, rng), captions(n), len(), summary.

    Captions come from `captions`, a list or COCO captions JSON; else from all .jsonl, .csv, .tsv
    and .txt whose rows name pictures (as Hugging Face's ImageFolder, or Flickr8k) and from x.txt,
    each line a caption, beside x.png; else the name of a picture's folder is its caption. Where
    there is a list, pictures without a caption are left out.

    split: "train"; "held-out", the 2 % of pictures whose names' hash says so; "all". Raises
    SystemExit if there is no picture, or if a list lies there that cannot be read while all
    captions would be the same; ValueError if a list is not as described.
    """

    def __init__(self, path, captions="", size=256, crop=tokenizer_crop, split="train"):
        self.size, self.crop, self.bad, self.files = size, crop, set(), _index(path)
        pictures = [name for name in self.files if name.lower().endswith(ENDINGS)]
        lists = {name: file for name, file in self.files.items() if name.lower().endswith(LISTS)}
        if captions:
            lists = {os.path.relpath(captions, path).replace(os.sep, "/"): File(captions)}
        texts, used, lost = _captions(self.files, pictures, lists)
        if pictures and (lost or captions) and not texts:
            raise ValueError(f"{captions or min(used)} names {lost[:1]}, but no picture, such as "
                             f"{pictures[0]}; expected {EXPECTED}")
        self.texts = texts or {name: [_folder(name)] for name in pictures}
        for name, found in self.texts.items():    # captions, or lists of them
            lines = sum((text if isinstance(text, list) else [text] for text in found), [])
            lines = [" ".join(clean(str(line)).split()) for line in lines if line]
            self.texts[name] = [line for line in lines if line] or [""]
        held = {name for name in self.texts if zlib.crc32(os.fsencode(name)) % 50 == 0}
        chosen = {"train": self.texts.keys() - held, "held-out": held, "all": self.texts}[split]
        self.names = sorted(chosen or self.texts)    # too few cannot be split
        # One line says what was read and what was not; what cannot be meant is refused.
        unread = sorted(self.files.keys() - used - set(pictures))
        endings = sorted({splitext(name)[1] or basename(name) for name in unread})
        words = {line for lines in self.texts.values() for line in lines} - {""}
        bare = sum(lines == [""] for lines in self.texts.values())
        self.summary = clean(
            f"{path}: {len(self.texts)} pictures of {len(self.files)} files; {len(words)} captions,"
            f" such as {min(words, default='')!r}, from {min(used, default='names of folders')}; "
            f"without caption {bare}, in no list {len(pictures) - len(self.texts)}, rows without "
            f"picture {len(lost)} {lost[:1]}; not read: {len(unread)} files {endings}")
        if not pictures:
            raise SystemExit(f"--data {self.summary}; expected a folder, or plain .tar shards, not "
                             ".tar.gz or .zip, with .jpg, .png or others that Pillow reads")
        stray = [name for name in unread if MAY_BE_LIST.search("/" + name)]
        if len(words) == 1 and stray and not used:
            raise SystemExit(f"--data {path}: each caption would be the folder's name, {words}, as "
                             f"{stray[0]} is not read: expected {EXPECTED}, COCO's file by "
                             "--captions, or what is no list elsewhere")

    def __len__(self):
        return len(self.names)

    def sample(self, index, rng):
        """-> uint8 (size, size, 3), caption. Raises OSError for a file that is bad or gone."""
        name = self.names[index]
        # 3/2·size is the largest t of tokenizer_crop: decoding at no less loses nothing.
        image = open_image(io.BytesIO(_read(self.files[name])), round(1.5 * self.size))
        captions = self.texts[name]
        return self.crop(image, self.size, rng), captions[rng.integers(len(captions))]

    def captions(self, n):
        """At most n captions, spread evenly over all: list[str]."""
        captions = [text for name in self.names for text in self.texts[name]]
        n = min(n, len(captions))
        return [captions[i * len(captions) // n] for i in range(n)]


def open_data(path, captions="", size=256, crop=tokenizer_crop, split="train", seed=0):
    """The data of --data and --captions: built-in scenes if path is empty, else Pictures."""
    if path:
        return Pictures(path, captions, size, crop, split)
    return Scenes("seen" if split == "held-out" else split, size, seed)


def save_grid(path, rows, labels=()):
    """Write rows of pictures (3,H,W) in [0,1] as one PNG, all as large as the first one; small ones
    are enlarged pixel by pixel. labels: for each row those of its pictures, or of the first few."""
    height, width = rows[0][0].shape[1:]
    zoom, foot = max(1, 128 // width), 18 if labels else 0
    across, down = zoom * width + 4, zoom * height + 4 + foot
    sheet = Image.new("RGB", (across * max(map(len, rows)), down * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = Image.fromarray(pixels(picture)).resize((zoom * width, zoom * height), 0)
            sheet.paste(tile, (x * across + 2, y * down + 2))
    for y, row in enumerate(labels):
        for x, label in enumerate(row):
            ImageDraw.Draw(sheet).text((x * across + 3, (y + 1) * down - foot), label, "black")
    sheet.save(path)


# ---------------------------------------------------------------------------------------------
# 3. Text
# ---------------------------------------------------------------------------------------------

PAD, UNKNOWN, BOS, EOS = range(4)


def train_tokens(captions, pieces=16_000):
    """A SentencePiece vocabulary (Parti §2.2: 16,000) from list[str] -> its bytes.

    BPE, which makes words of few captions too. Case is folded. What the vocabulary lacks is
    spelt in UTF-8 bytes, so that no text is unknown. Few captions give fewer pieces. Raises
    ValueError if no caption has any text.
    """
    captions = [caption[:1000] for caption in captions if caption.strip()]
    if not captions:
        raise ValueError("no picture has a caption: give --captions FILE, a metadata.jsonl with "
                         "file_name and text, x.txt beside x.png, or folders with names")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=model, vocab_size=pieces,
        model_type="bpe", hard_vocab_limit=False, byte_fallback=True, num_threads=1,
        normalization_rule_name="nmt_nfkc_cf", minloglevel=2,
        pad_id=PAD, unk_id=UNKNOWN, bos_id=BOS, eos_id=EOS)
    return model.getvalue()


class Text:
    """list[str] -> (B,T) int64: token ids, EOS, then padding 0. "" is padding alone: no condition.

    model: the bytes of `train_tokens`. `vocab` is the number of ids. Captions are cut to T = length
    tokens (Parti §2.2: 128), of which the first one is shown.
    """

    def __init__(self, model, length=128):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.length, self.vocab, self.warned = length, self.pieces.vocab_size(), False

    def __call__(self, captions):
        ids = torch.full((len(captions), self.length), PAD)                 # (B,T)
        for row, caption, tokens in zip(ids, captions, self.pieces.encode(list(captions))):
            kept = tokens[: self.length - 1] + [EOS] if tokens else []
            row[: len(kept)] = torch.tensor(kept)
            if len(tokens) >= self.length and not self.warned:
                say(f"texts are cut to {self.length} tokens, the first one: {caption[:60]!r}")
                self.warned = True
        return ids


# ---------------------------------------------------------------------------------------------
# 4. Stream: the order of the data is a function of (seed, position) and of nothing else
# ---------------------------------------------------------------------------------------------

@lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    """The order of n pictures in an epoch, a permutation of 0 .. n-1."""
    return np.random.default_rng((seed, epoch, 1)).permutation(n)


class Stream(torch.utils.data.Dataset):
    """Endless: position -> uint8 (3,S,S), caption, a line for each bad picture that was met.

    The generator of a sample, for augmentation and for caption dropout, is seeded by (seed,
    position), so neither workers nor processes nor a resume change anything, and no state has to
    be saved. drop: probability of an empty caption. Raises OSError at 100 bad pictures in a row.
    """

    def __init__(self, dataset, seed, drop=0.0):
        self.dataset, self.seed, self.drop = dataset, seed, drop

    def __getitem__(self, position):
        rng, bad = np.random.default_rng((self.seed, position)), []
        for later in range(position, position + 100):    # a bad picture gives way to the next one
            epoch, index = divmod(later, len(self.dataset))
            index = (later if isinstance(self.dataset, Scenes) else    # these never repeat
                     shuffled(len(self.dataset), self.seed, epoch)[index])
            try:
                image, caption = self.dataset.sample(index, rng)            # (S,S,3)
                caption = "" if rng.random() < self.drop else caption
                return torch.from_numpy(image).permute(2, 0, 1).contiguous(), caption, "".join(bad)
            except OSError as error:
                bad.append(f"{self.dataset.names[index]}: {error.strerror or error}\n")
        raise OSError(f"100 bad pictures in a row, the last one {bad[-1].strip()}")


def batches(dataset, batch, seed, start, steps, rank=0, world=1, micro=0, workers=0, drop=0.0):
    """Yields uint8 (b,3,S,S), list of b captions: in parts of b <= micro (0: all), this process's
    share, batch/world, of the global batches of the steps start .. steps-1.

    drop: probability of an empty caption. Each bad picture is named once; raises OSError when
    these are more than half of all, or 100 in a row.
    """
    if batch % world:
        raise ValueError(f"--batch {batch}: expected a multiple of the {world} processes")
    share = batch // world    # from step * batch + rank * share on, in parts of micro
    positions = (range(first + i, first + min(i + (micro or share), share))
                 for first in range(start * batch + rank * share, steps * batch, batch)
                 for i in range(0, share, micro or share))
    loader = torch.utils.data.DataLoader(
        Stream(dataset, seed, drop), batch_sampler=positions, num_workers=workers,
        pin_memory=torch.cuda.is_available(), generator=torch.Generator())   # leaves torch's alone
    for images, captions, bad in loader:
        for line in {*"".join(bad).splitlines()} - dataset.bad:
            dataset.bad.add(line)
            tqdm.write(clean(f"skipped a bad picture ({len(dataset.bad)} so far): {line}"))
        if len(dataset.bad) > len(dataset) / 2:
            raise OSError(f"more than half of the pictures are bad, such as {min(dataset.bad)}")
        yield images, list(captions)


# ---------------------------------------------------------------------------------------------
# 5. Runtime: what both training scripts must do alike to be right
# ---------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a run does and where; every field is an option of both training scripts."""
    stage: str
    data: str = ""           # folder or .tar; empty: built-in scenes
    preset: str = ""         # sizes and recipe; empty: see `parse`
    out: str = "out/"        # folder of checkpoints, logs and pictures
    init: str = ""           # checkpoint from whose weights a new run starts
    fresh: bool = False      # start over
    workers: int = 0         # processes that load data; on a GPU one a core, at most 8
    device: str = "auto"     # auto, cpu, cuda or mps
    dtype: str = "auto"      # auto, float32 or bfloat16
    compile: bool = False
    wandb: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: what both stages share. The papers' values stand in the scripts."""
    steps: int
    batch: int                    # pictures per step of the optimizer, over all processes
    micro: int = 0                # that a process computes at a time; 0: 16 on a GPU, 4 on a CPU
    lr: float
    warmup: int = 0               # steps in which the rate grows to lr
    schedule: str = "cosine"      # of the rate: cosine, exponential or linear
    decay_from: int = 0           # step at which the rate begins to fall
    final: float = 0.5            # last rate as a fraction of lr
    weight_decay: float
    clip: float = math.inf        # largest norm of the gradient
    seed: int = 0                 # of weights, data and dropout
    save_every: int = 1000        # steps; evaluates, too


EARLY = 10, 100, 400    # steps after which one wants a first look


def parse(description, options, presets, recipes, large, derived=()):
    """Command line -> options, config, recipe: dataclasses, one option for each of their fields.

    presets: {name: config}; recipes: {stage: {name: recipe}}. Unless --preset names one it is tiny
    for the built-in scenes and, with --data, `large` on a GPU, mini without. derived: fields that
    are no options, since they follow from something else.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in (options, presets["tiny"], recipes[options.stage]["tiny"]):
        for name, value in vars(part).items():
            how = {"type": type(value), "help": f"{value!r} unless the preset says otherwise"}
            if isinstance(value, bool):
                how = {"action": argparse.BooleanOptionalAction}
            elif isinstance(value, tuple):
                how = {"type": int, "nargs": "*"}
            if name not in derived:
                parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args())
    gpu = pick(given.get("device", "auto"))[0].type == "cuda"
    usual = "tiny" if not given.get("data") else large if gpu else "mini"
    if usual == "mini" and "preset" not in given:
        say(f"--preset mini, as no GPU is used: 64 pixels; the papers' own is --preset {large}")
    preset, stage = given.setdefault("preset", usual), given.get("stage", options.stage)
    if preset not in presets or stage not in recipes:
        parser.error(f"--preset {preset} --stage {stage}: expected {[*presets]}, {[*recipes]}")
    recipe = recipes[stage][preset]
    given["micro"] = given.get("micro") or recipe.micro or (16 if gpu else 4)
    if gpu:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        given.setdefault("workers", min(8, cores))
    return [dataclasses.replace(part, **{name: given[name] for name in vars(part) if name in given})
            for part in (options, presets[preset], recipe)]


def pick(device="auto", dtype="auto", width=0):
    """--device and --dtype -> (torch.device, torch.dtype): the fastest correct choice.

    width: of the matrices. On a CPU bfloat16 pays for wide ones alone, and only where the processor
    has instructions for it. Raises RuntimeError for a device that torch does not know.
    """
    here = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(here if device == "auto" else device)
    fast = device.type == "cpu" and width >= 512 and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))    # a GPU a process
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        dtype = "bfloat16" if fast else "float32"
    return device, getattr(torch, dtype)


def begin(options, width):
    """Join the processes that torchrun started -> rank, world, device, autocast. Plain `python` is
    one process; on a GPU they talk by NCCL, else by gloo."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, dtype = pick(options.device, options.dtype, width)
    hoped = options.device == "auto" and (torch.version.cuda or shutil.which("nvidia-smi"))
    if hoped and device.type == "cpu":
        say("no GPU is used, as torch reaches none: compare its driver's CUDA, which nvidia-smi "
            f"shows, with torch's, {torch.version.cuda} (None: a build for CPUs)")
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    os.makedirs(options.out, exist_ok=True)
    if options.wandb and rank == 0:
        import wandb
        wandb.init(project="parti", name=options.stage, dir=options.out)
    return rank, world, device, torch.autocast(device.type, dtype, dtype != torch.float32)


def average(tensor):
    """The mean of a tensor over all processes, which call this together; use what is returned."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
        tensor = tensor / dist.get_world_size()
    return tensor


def parallel(network, world, compile=False):
    """-> the network as all processes train it together (DDP); train it only through this."""
    if compile:
        network.compile()
    if world > 1 and not isinstance(network, FSDPModule):
        network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    return network


def rate(recipe, step):
    """The learning rate of update `step`, counted from 1: linear warm-up, flat to decay_from, then
    "cosine" (ViT-VQGAN §5.1), "exponential" (Parti §3) or "linear" down to final * lr at the end.
    """
    if step < recipe.warmup:
        return recipe.lr * step / recipe.warmup
    begin = max(recipe.warmup, recipe.decay_from)
    progress = min(max(step - begin, 0) / max(recipe.steps - begin, 1), 1.0)
    factors = {"cosine": (1 + recipe.final + (1 - recipe.final) * math.cos(math.pi * progress)) / 2,
               "linear": 1 - progress * (1 - recipe.final),
               "exponential": recipe.final ** progress}
    if recipe.schedule not in factors:
        raise ValueError(f"--schedule {recipe.schedule}: expected {', '.join(factors)}")
    return recipe.lr * factors[recipe.schedule]


def update(network, optimizer, lr, clip, skipped):
    """Clip the gradient, make a step, clear the gradient -> its norm.

    A norm that is not finite changes nothing but `skipped`, this network's {"total", "in_a_row"};
    gradients are shared, so that all processes see it. RuntimeError after 20 in a row.
    """
    norm = nn.utils.clip_grad_norm_(network.parameters(), clip)
    norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()    # FSDP's
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
        skipped["in_a_row"] = 0
    else:
        skipped["total"] += 1
        skipped["in_a_row"] += 1
    optimizer.zero_grad()
    if skipped["in_a_row"] == 20:
        raise RuntimeError("20 steps in a row were not finite and changed nothing: lower --lr, or "
                           "--dtype float32; the same command continues from the last checkpoint")
    return norm


WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)    # sharded or not


def identity(options):
    """What a run is, beside its sizes: a checkpoint of another one is not continued."""
    folder = options.data and os.path.abspath(options.data)
    source = options.init and os.path.abspath(options.init)
    return {"stage": options.stage, "data": folder, "init": source}


def save(path, content, parts):
    """Write a checkpoint: `content`, plain values, and the states of parts, {prefix: (network,
    optimizer)}. All processes call it, the first one writes. Whenever it is killed, the file at
    `path` is a whole checkpoint, this one or the one before."""
    content = dict(content)
    for prefix, part in parts.items():
        states = dcp.get_state_dict(*part, options=WHOLE)
        content[prefix + "model"], content[prefix + "optimizer"] = states
    if int(os.environ.get("RANK", "0")) > 0:
        return
    content["logged"] = path.with_suffix(".csv").stat().st_size
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def resume(path, saved, content, parts):
    """Continue parts where the checkpoint `saved` stands (None: there is none) -> the steps done,
    and for each part the count of skipped ones for `update`.

    SystemExit if it was made for something else: content["made_for"], {name: value}, must match.
    """
    done, skipped = 0, {prefix: {"total": 0, "in_a_row": 0} for prefix in parts}
    if saved:
        there, here = saved.get("made_for", {}), content["made_for"]
        wrong = {name: (there.get(name), here[name]) for name in here
                 if there.get(name) != here[name]}
        if wrong:
            raise SystemExit(f"{path} is another run's; {wrong} are what is there and here: give "
                             "this one its own --out, or start over with --fresh")
        for prefix, part in parts.items():
            dcp.set_state_dict(*part, model_state_dict=saved[prefix + "model"],
                               optim_state_dict=saved[prefix + "optimizer"], options=WHOLE)
        done, skipped = saved["step"], saved["skipped"]
    steps, network = content["recipe"]["steps"], parts[""][0]
    how = "going on" if done < steps else "finished; more --steps go on, --fresh starts over"
    say(f"{path}: {sum(p.numel() for p in network.parameters()):,} parameters, step {done} of "
        f"{steps}, {how}")
    # What was logged after the checkpoint will be done, and logged, again.
    log = path.with_suffix(".csv")
    if log.exists() and int(os.environ.get("RANK", "0")) == 0:
        os.truncate(log, saved["logged"] if saved else 0)
    return done, skipped


def log(path, row, wandb=False):
    """Append {column: number} to a CSV file; the keys of the first row are its columns."""
    with open(path, "a") as file:
        if file.tell() == 0:
            file.write(",".join(row) + "\n")
        file.write(",".join(map(str, row.values())) + "\n")
    if wandb:
        sys.modules["wandb"].log({name: value for name, value in row.items() if value != ""})
