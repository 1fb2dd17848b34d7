"""Draw pictures from prompts, or measure what has been trained (Parti §2.4, §5).

    python sample.py "a red circle above a blue square" "two green crosses"    # -> out/samples.png
    python sample.py --prompts PartiPrompts.tsv --rerank 16 --upsample         # -> out/prompts/
    python sample.py --evaluate                                                # -> out/evaluate.csv

Reads vqgan.pt and prior.pt in --out and, where they are there or asked for, decoder.pt (the larger
decoder), text.pt (the reranker) and upsampler.pt. The prompt "" draws without a text.
"""
import csv
import hashlib
import os
import re
import sys
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import prior
import vqgan
from data import (Scenes, Text, batches, check, kind, launch, open_data, parse, pick, prior_crop,
                  read_checkpoint, save_grid, say)

BATCH = 64   # pictures drawn at a time
SWEEP = (1.0, 1.2, 2.0, 3.0, 4.0)   # guidance scales that --evaluate compares


@dataclass(frozen=True)
class Options:
    n: int = field(default=4, metadata={"help": "pictures per prompt"})
    guidance: float = field(default=-1.0, metadata={"help": "Parti Eq. 1; -1: the checkpoint's"})
    temperature: float = field(default=-1.0, metadata={"help": "0: always the likeliest code"})
    top_k: int = field(default=-1, metadata={"help": "only the k likeliest codes; 0: all"})
    top_p: float = field(default=-1.0, metadata={"help": "only the codes that hold this share"})
    rerank: int = field(default=0, metadata={"help": "candidates, of which the best n are kept"})
    upsample: bool = field(default=False, metadata={"help": "enlarge with upsampler.pt"})
    seed: int = 0
    prompts: str = field(default="", metadata={"help": "file: a prompt a line, or PartiPrompts"})
    evaluate: bool = field(default=False, metadata={"help": "measure instead of drawing"})
    limit: int = field(default=0, metadata={"help": "pictures per measurement (0: 512); prompts"})
    data: str = field(default="", metadata={"help": "to evaluate on; empty: as in training"})
    captions: str = field(default="", metadata={"help": "COCO captions JSON, with --data"})
    inception: str = field(default="", metadata={"help": "NVIDIA's TorchScript file, for FID"})
    vqgan: str = field(default="", metadata={"help": "tokenizer; empty: the prior's"})
    out: str = field(default="out", metadata={"help": "folder of checkpoints and results"})
    device: str = "auto"
    dtype: str = "auto"


# ---------------------------------------------------------------------------------------------
# Drawing

class Painter:
    """The trained parts in options.out. Without prior.pt, --evaluate still measures the tokenizer
    (.prior is None). .ranker is None unless asked for, or evaluated because it is there."""

    def __init__(self, options):
        self.options, out = options, Path(options.out)
        self.device, dtype = pick(options.device, options.dtype)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        self.prior = self.ranker = self.upsampler = None
        saved = {}
        if not options.evaluate or (out / "prior.pt").exists():
            path = self.find("prior.pt", "train_vqgan.py && python train_prior.py")
            saved = read_checkpoint(path)
            self.prior, self.text = prior.load(path).to(self.device), words(saved)
        self.sampling = dict(guidance=1.2, temperature=1.0, top_k=0, top_p=1.0)   # Parti's
        self.sampling |= saved.get("sampling", {})                                # the preset's
        self.sampling |= {k: v for k in self.sampling if (v := getattr(options, k)) >= 0}
        self.sampling["temperature"] = max(self.sampling["temperature"], 1e-4)
        self.val = saved.get("val", {})

        path = options.vqgan or saved.get("vqgan", "")
        if not options.vqgan and not Path(path).is_file():   # out/ may have moved since
            path = self.find("vqgan.pt", "train_vqgan.py")
        self.vqgan = self.decoder = vqgan.load(path).to(self.device)
        there, here = self.vqgan.config, (self.prior or self.vqgan).config
        if (there.codes, there.grid) != (here.codes, here.grid):
            raise SystemExit(f"{path} has {there.codes} codes, grid {there.grid}; the prior has "
                             f"{here.codes}, {here.grid}: give its own tokenizer, --vqgan FILE")
        if (out / "decoder.pt").exists():
            larger = vqgan.load(out / "decoder.pt").to(self.device)
            if torch.equal(larger.codebook, self.vqgan.codebook):   # else another tokenizer's
                self.decoder = larger
        if options.rerank or options.evaluate and (out / "text.pt").exists():
            saved = read_checkpoint(self.find("text.pt", "train_prior.py --stage text"))
            config, self.side = prior.PriorConfig(**saved["config"]), saved["image_size"]
            ranker = prior.DualEncoder(config, self.side, saved["patch"])
            ranker.load_state_dict(saved["model"])
            self.ranker, self.ranker_text = ranker.to(self.device).eval(), words(saved)
        if options.upsample:
            saved = read_checkpoint(self.find("upsampler.pt", "train_vqgan.py --stage upsampler"))
            self.upsampler = vqgan.Upsampler(**saved["config"])
            self.upsampler.load_state_dict(saved["model"])
            self.upsampler.to(self.device)

    def find(self, name, command):
        """Path of a checkpoint; where it is missing, one line with the command that makes it."""
        path = Path(self.options.out, name)
        if not path.exists():
            raise SystemExit(f"{path} does not exist; this makes it: python {command}")
        return path

    def draw(self, captions, candidates=1, **sampling):
        """B captions -> M candidates for each (B, M, 3, S, S) in [0, 1] and their scores (B, M):
        cosine with the caption, or 0 without a ranker. sampling overrides guidance and so on."""
        text = self.text(captions).repeat_interleave(candidates, dim=0)    # (B*M, T)
        how = {**self.sampling, **sampling, "generator": self.generator}
        with self.autocast:
            pictures = torch.cat([
                self.decoder.decode(self.prior.generate(part.to(self.device), **how)).clamp(0, 1)
                for part in text.split(BATCH)])                            # (B*M, 3, S, S)
            scores = torch.zeros(len(text))
            if self.ranker:
                small = F.interpolate(pictures, (self.side, self.side), mode="area")
                text = self.ranker.embed_text(self.ranker_text(captions).to(self.device))
                text = text.repeat_interleave(candidates, dim=0)           # (B*M, D)
                scores = (text * self.ranker.embed_images(small)).sum(-1).cpu()
        return pictures.cpu().unflatten(0, (-1, candidates)), scores.view(-1, candidates)

    def paint(self, captions):
        """B captions -> n pictures for each (B, n, 3, S, S), reranked and enlarged as asked."""
        n = max(1, self.options.n)
        pictures, _ = best(*self.draw(captions, max(n, self.options.rerank)), n)
        if self.upsampler:
            parts = pictures.flatten(0, 1).split(8)
            parts = [self.upsampler(part.to(self.device)).clamp(0, 1).cpu() for part in parts]
            pictures = torch.cat(parts).unflatten(0, (-1, n))
        return pictures


def words(saved):
    """The text tokens of a checkpoint."""
    return Text(saved["text"].numpy().tobytes(), saved["config"]["text_length"])


def best(pictures, scores, n):
    """(B, M, ...), scores (B, M) -> the n best of each row, their scores; equal ones keep their
    order (reranking, Parti §2.4)."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :n]     # (B, n)
    return pictures[torch.arange(len(order))[:, None], order], scores.gather(1, order)


def to_bytes(images):
    """Floats in [0, 1] -> uint8."""
    return images.mul(255).round().byte()


def read_prompts(path):
    """-> [{"Prompt": ...}], with Category and Challenge from the TSV of PartiPrompts, where quotes
    are literal. Any other file holds a prompt a line. SystemExit if it cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--prompts {path}: {error}; expected a text file in UTF-8")
    lines = [line.rstrip("\r") for line in lines if line.strip()]
    if not lines:
        raise SystemExit(f"--prompts {path} holds no prompt")
    if lines[0].split("\t")[0] != "Prompt":
        return [{"Prompt": line} for line in lines]
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def slug(text):
    """Any text -> a short name for every file system; letters that are not ASCII are lost."""
    return re.sub("[^a-z0-9]+", "-", text.lower())[:60].strip("-")


def draw_file(painter, options):
    """A file of prompts -> out/prompts/: pictures, whose names end in a digest of the settings, and
    contact sheets (of at most 400 prompts) by category and by challenge. What is there is kept, and
    each group of prompts has random numbers of its own, so that a run that was stopped continues as
    if it had not been."""
    rows, sheets = read_prompts(options.prompts)[:options.limit or None], defaultdict(list)
    settings = painter.sampling, options.n, options.rerank, options.upsample, options.seed
    digest = f"{zlib.crc32(repr(settings).encode()):08x}"
    folder = Path(options.out, "prompts")
    folder.mkdir(exist_ok=True)
    for i, row in enumerate(rows):
        stem = f"{i + 1:05d}-{slug(row['Prompt'])}-{digest}"
        row["files"] = [folder / f"{stem}-{k + 1}.png" for k in range(max(1, options.n))]
        for name in {f"{column} {row[column]}" if row.get(column) else "all"
                     for column in ("Category", "Challenge")}:
            sheets[slug(name)].append(row)
    group = max(1, BATCH // max(1, options.n, options.rerank))
    for start in tqdm(range(0, len(rows), group), "groups of prompts"):
        part = rows[start:start + group]
        if all(file.exists() for row in part for file in row["files"]):
            continue
        painter.generator.manual_seed(options.seed + start)
        for row, pictures in zip(part, painter.paint([row["Prompt"] for row in part])):
            for file, picture in zip(row["files"], to_bytes(pictures).permute(0, 2, 3, 1)):
                Image.fromarray(picture.numpy()).save(f"{file}.tmp", "PNG")
                os.replace(f"{file}.tmp", file)    # a kill leaves no half picture
    for name, part in sheets.items():
        small = [[Image.open(file).resize((128, 128), Image.BOX) for file in row["files"]]
                 for row in part[:400]]
        pictures = torch.from_numpy(np.array(small)).permute(0, 1, 4, 2, 3) / 255
        save_grid(folder / f"{name}.png", pictures, [row["Prompt"] for row in part[:400]])
    say(f"{folder}: pictures ...-{digest}-*.png, contact sheets {', '.join(sheets)}")


# ---------------------------------------------------------------------------------------------
# Measuring

def wilson(right, n):
    """95 % interval (low, high) of a share right / n, after Wilson."""
    z = 1.959964
    centre, square = right + z * z / 2, right * (n - right) / n + z * z / 4
    return [(centre + sign * z * square ** 0.5) / (n + z * z) for sign in (-1, 1)]


def frechet(mu1, s1, mu2, s2):
    """Distance of two Gaussians with means (D,) and covariances (D, D), in float64:
    |mu1 - mu2|^2 + tr s1 + tr s2 - 2 tr (s1 s2)^(1/2). The last trace is that of the root of
    r s2 r with r r = s1, which has the eigenvalues of s1 s2 and is symmetric."""
    mu1, s1, mu2, s2 = (x.double() for x in (mu1, s1, mu2, s2))
    values, vectors = torch.linalg.eigh(s1)
    r = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(r @ s2 @ r).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def moments(features):
    """List of features (b, D) -> their mean (D,) and covariance (D, D) in float64."""
    x = torch.cat(features).double()
    return x.mean(0), torch.cov(x.T)


def load_inception(path, device):
    """NVIDIA's TorchScript Inception -> function of uint8 pictures (b, 3, H, W), which it resizes
    itself, that gives features (b, 2048) on the CPU. SystemExit if it cannot be loaded."""
    try:
        net = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"--inception {path}: {str(error).splitlines()[0]}")
    return lambda images: net(images.to(device), return_features=True).cpu()


def reference(inception, dataset, n, options):
    """Moments of the features of n real pictures, kept in out/ under a digest of the network and
    of every pixel."""
    digest = hashlib.sha256(Path(options.inception).read_bytes())
    for images, _ in held_out(dataset, n, options.seed, "digest"):
        digest.update(images.numpy().tobytes())
    path = Path(options.out, f"fid-{digest.hexdigest()[:16]}.pt")
    if not path.exists():
        pictures = held_out(dataset, n, options.seed, "reference")
        torch.save(moments([inception(images) for images, _ in pictures]), f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    return torch.load(path, weights_only=True)


def held_out(dataset, n, seed, what):
    """-> uint8 pictures (b, 3, S, S) and captions: n samples, or all if there are fewer."""
    n = min(n, len(dataset))
    size = min(BATCH, n)
    steps = -(-n // size)
    bar = tqdm(batches(dataset, size, seed, 0, steps), what, steps, leave=False)
    for step, (images, captions) in enumerate(bar):
        yield images[:n - step * size], captions[:n - step * size]


def note(tally, key, name, pictures, captions, dataset):
    """Of built-in scenes, add to tally[*key, name and group] whether pictures show their captions:
    for all of them and, but for the sweep, by kind and for those that name a background."""
    for picture, caption in zip(pictures, captions) if isinstance(dataset, Scenes) else ():
        groups = ["all", kind(caption)] + ["background named"] * (" on " in caption)
        right = bool(check(picture, caption))
        for group in groups[:1] if key[0].startswith("sweep") else groups:
            tally[*key, f"{name}: {group}"].append(right)


def note_drawn(painter, tally, split, captions, dataset, candidates, **sampling):
    """Draw captions; add how good the first candidates are, and the best, which are returned."""
    pictures, scores = painter.draw(captions, candidates, **sampling)
    for m in sorted({1, candidates}):
        chosen, score = best(pictures[:, :m], scores[:, :m], 1)
        key = split, (painter.sampling | sampling)["guidance"], m
        note(tally, key, "right", chosen[:, 0], captions, dataset)
        if painter.ranker:
            tally[*key, "text-image cosine"] += score[:, 0].tolist()
    return chosen[:, 0]


def measure(painter, split, dataset, n, tally, inception):
    """Tokenizer, prior and drawn pictures on n held-out samples: adds to tally a value per picture,
    yields rows (split, guidance, candidates, measure, n, value) of what is not a mean of such."""
    options, key, codes, features = painter.options, (split, "", ""), [], defaultdict(list)
    for images, captions in held_out(dataset, n, options.seed, split):
        real = images.to(painter.device) / 255
        tokens = painter.vqgan.encode(real)
        made = {"rFID": painter.decoder.decode(tokens).clamp(0, 1)}
        decibels = vqgan.psnr(real, made["rFID"])
        codes.append(tokens.cpu())
        tally[*key, "tokenizer: PSNR, dB"] += decibels.tolist()
        tally[*key, "tokenizer: MSE"] += (10 ** (-decibels / 10)).tolist()
        note(tally, key, "reconstruction right", made["rFID"], captions, dataset)
        if painter.prior:
            with painter.autocast:
                logits = painter.prior(painter.text(captions).to(painter.device), tokens)
            loss = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(1)
            tally[*key, "prior: cross-entropy, nats per token"] += loss.tolist()
            made["FID"] = note_drawn(painter, tally, split, captions, dataset,
                                     max(1, options.rerank))
        for name in made if inception else ():
            features[name].append(inception(to_bytes(made[name])))
    usage = vqgan.codebook_usage(torch.cat(codes), painter.vqgan.config.codes)
    count = sum(map(len, codes))
    yield *key, "tokenizer: codebook usage, 256 pictures", count, usage[0]
    yield *key, "tokenizer: codebook perplexity", count, usage[1]
    for name, parts in features.items() if count > 1 else ():
        if count < 2048:
            say(f"{name} of {count} pictures: degenerate below 2,048, do not compare it")
        real = reference(inception, dataset, n, options)
        yield *key, name, count, frechet(*real, *moments(parts))


def evaluate(painter, options):
    """Measure what is in out/, on built-in scenes or --data -> a table and out/evaluate.csv. Ctrl-C
    ends the measuring, not the table. The sweep over guidance, with a fifth of the captions, also
    compares best of 8 (or of --rerank) with the first where there is a ranker."""
    data = options.data or painter.val.get("data", "")
    captions = options.captions or ("" if options.data else painter.val.get("captions", ""))
    inception = load_inception(options.inception, painter.device) if options.inception else None
    splits = {split: open_data(data, captions, painter.vqgan.config.image_size, prior_crop, split,
                               options.seed)
              for split in (["held-out"] if data else ["seen", "combination", "pair"])}
    n, tally, rows = options.limit or 512, defaultdict(list), []
    candidates = options.rerank or (8 if painter.ranker else 1)
    try:
        for split, dataset in splits.items():
            rows += measure(painter, split, dataset, n, tally, inception)
        for guidance in SWEEP if painter.prior and not data else ():
            for split, dataset in splits.items():
                what = f"{split}, guidance {guidance}"
                for _, texts in held_out(dataset, max(1, n // 5), options.seed, what):
                    note_drawn(painter, tally, f"sweep: {split}", texts, dataset, candidates,
                               guidance=guidance)
    except KeyboardInterrupt:
        say("stopped; what has been measured so far:")
    for key, values in tally.items():
        bounds = wilson(sum(values), len(values)) if isinstance(values[0], bool) else ()
        rows.append((*key, len(values), sum(values) / len(values), *bounds))
    names = "split guidance candidates measure n value low high".split()
    path = Path(options.out, "evaluate.csv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    for split, guidance, candidates, name, count, *value in rows:
        value = "".join(f"{x:10.4g}" for x in value)
        print(f"{split:18} {guidance!s:4} {candidates!s:3} {name:40} {count:6}{value}")
    print(f"columns: {', '.join(names)}; low and high: 95 % interval after Wilson. {path}")


@torch.no_grad()
def main():
    prompts, given = [], []    # `parse` knows options only; prompts may stand between them
    for before, word in zip(["", *sys.argv[1:]], sys.argv[1:]):
        flag = before.lstrip("-") in ("", "help", "evaluate", "upsample") or "=" in before
        value = before.startswith("--") and not flag
        (given if value or word.startswith("--") else prompts).append(word)
    options, _, _ = parse(__doc__, Options(), argv=given)
    if not (prompts or options.prompts or options.evaluate):
        raise SystemExit('no prompt; try: python sample.py "a red circle above a blue square"')
    painter = Painter(options)
    if options.evaluate:
        evaluate(painter, options)
    elif options.prompts:
        draw_file(painter, options)
    else:
        prompts = [prompt.encode(errors="replace").decode() for prompt in prompts]
        path = Path(options.out, "samples.png")
        labels = [" ".join(prompt.split()) or "(no text)" for prompt in prompts]
        save_grid(path, painter.paint(prompts), labels)
        print(path)


if __name__ == "__main__":
    launch(main)
