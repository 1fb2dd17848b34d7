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
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import vqgan
from data import (Scenes, Text, batches, check, clean, explain, kind, launch, open_data, option,
                  parse, pick, prior_crop, save_grid, say)
from prior import DualEncoder, Parti, PriorConfig

BATCH = 64   # pictures drawn at a time
SWEEP = (1.0, 1.2, 2.0, 3.0, 4.0)   # guidance scales that --evaluate compares


@dataclass(frozen=True)
class Options:
    words: tuple = option((), "prompts; quote them")
    n: int = option(4, "pictures per prompt")
    guidance: float = option(-1.0, "lambda of Parti Eq. 1; below 0: the checkpoint's", least=-1)
    temperature: float = option(-1.0, "0: the likeliest code; below 0: the checkpoint's", least=-1)
    top_k: int = option(-1, "the k likeliest codes, 0: all; below 0: the checkpoint's", least=-1)
    top_p: float = option(-1.0, "codes with this share; below 0: the checkpoint's", least=-1)
    rerank: int = option(0, "candidates, at least n, of which the best n are kept")
    upsample: bool = option(False, "enlarge with upsampler.pt")
    seed: int = 0
    prompts: str = option("", "file: a prompt a line, or PartiPrompts")
    evaluate: bool = option(False, "measure instead of drawing")
    limit: int = option(0, "prompts of a file; pictures per measurement, 0: 512")
    data: str = option("", "to --evaluate on; empty: as in training")
    captions: str = option("", "COCO captions JSON, with --data")
    inception: str = option("", "NVIDIA's TorchScript file, to --evaluate FID")
    vqgan: str = option("", "tokenizer; empty: the prior's")
    out: str = option("out", "folder of checkpoints and results")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("auto", "auto, float32 or bfloat16")


# ---------------------------------------------------------------------------------------------
# Drawing

class Painter(torch.nn.Module):
    """The trained parts in options.out; the only place that knows checkpoints. Without prior.pt,
    --evaluate still measures the tokenizer (.prior is None). .ranker is None unless asked for, or
    evaluated because it is there. SystemExit if a part is missing, damaged or does not fit."""

    def __init__(self, options):
        super().__init__()
        out, self.options = Path(options.out), options
        self.prior = self.ranker = self.upsampler = None
        self.saved, self.sampling = {}, {}
        if not options.evaluate or (out / "prior.pt").exists():
            self.prior, self.saved = vqgan.restore(
                out / "prior.pt", lambda saved: Parti(PriorConfig(**saved["config"])))
            self.text, kept = words(self.saved), self.saved["sampling"]
            self.sampling = kept | {k: v for k, v in vars(options).items() if k in kept and v >= 0}

        path = options.vqgan or self.saved.get("vqgan") or out / "vqgan.pt"
        self.vqgan = self.decoder = vqgan.load(path)
        width = (self.prior or self.vqgan).config.width
        self.device, dtype = pick(options.device, options.dtype, width)
        self.autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        self.generator = torch.Generator(self.device).manual_seed(options.seed)
        known = self.vqgan.fingerprint()
        if self.saved.get("tokenizer_fingerprint", known) != known:
            raise SystemExit(f"{path} is not the tokenizer that {out}/prior.pt was trained with: "
                             "give that one, --vqgan FILE, or train the prior again")
        if (out / "decoder.pt").exists():
            larger = vqgan.load(out / "decoder.pt")
            if larger.fingerprint() == known:    # else another tokenizer's
                self.decoder = larger
        if options.rerank or options.evaluate and (out / "text.pt").exists():
            self.ranker, judge = vqgan.restore(out / "text.pt", lambda saved: DualEncoder(
                PriorConfig(**saved["config"]), saved["image_size"], saved["patch"]))
            self.side, self.ranker_text = judge["image_size"], words(judge)
        if options.upsample:
            self.upsampler, _ = vqgan.restore(
                out / "upsampler.pt", lambda saved: vqgan.Upsampler(**saved["config"]))
        self.to(self.device)

    def parts(self, function, tensor, size=BATCH):
        """function of every `size` rows of a tensor, on the device -> all rows, on the CPU."""
        return torch.cat([function(part.to(self.device)).cpu() for part in tensor.split(size)])

    def draw(self, captions, candidates=1, **sampling):
        """B captions -> M candidates for each (B, M, 3, S, S) in [0, 1] and their scores (B, M):
        cosine with the caption, or 0 without a ranker. sampling overrides guidance and so on."""
        text = self.text(captions).repeat_interleave(candidates, dim=0)    # (B*M, T)
        scores = torch.zeros(len(captions), candidates)
        with self.autocast:
            tokens = self.parts(lambda part: self.prior.generate(
                part, generator=self.generator, **self.sampling | sampling), text)   # (B*M, N)
            pictures = self.parts(lambda part: self.decoder.decode(part).clamp(0, 1), tokens)
            if self.ranker:
                images = self.parts(lambda part: self.ranker.embed_images(
                    F.interpolate(part, (self.side, self.side), mode="area")), pictures)
                text = self.parts(self.ranker.embed_text, self.ranker_text(captions))     # (B, D)
                scores = (text[:, None] * images.unflatten(0, scores.shape)).sum(-1)
        return pictures.unflatten(0, scores.shape), scores

    def paint(self, captions):
        """B captions -> n pictures for each (B, n, 3, S, S), reranked and enlarged as asked."""
        n = self.options.n
        pictures, _ = best(*self.draw(captions, max(n, self.options.rerank)), n)
        if self.upsampler:
            large = self.parts(self.upsampler, pictures.flatten(0, 1), size=8)
            pictures = large.clamp(0, 1).unflatten(0, (-1, n))
        return pictures


def words(saved):
    """The text tokens of a checkpoint."""
    return Text(saved["text"].numpy().tobytes(), saved["config"]["text_length"])


def best(pictures, scores, n):
    """(B, M, ...), scores (B, M) -> the n best of each row, their scores; equal ones keep their
    order (reranking, Parti §2.4)."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :n]     # (B, n)
    return pictures[torch.arange(len(order))[:, None], order], scores.gather(1, order)


def read_prompts(path):
    """-> [{"Prompt": ...}], with Category and Challenge from the TSV of PartiPrompts, where quotes
    are literal. Any other file holds a prompt a line. SystemExit if it cannot be read."""
    with explain(f"--prompts {path}", "a text file in UTF-8"):
        text = Path(path).read_text(encoding="utf-8-sig")
    rows = [line.split("\t") for line in text.split("\n") if line.strip()]
    if rows and rows[0][0] != "Prompt":
        rows = [("Prompt", "Category"), *(("\t".join(row), "all") for row in rows)]
    if len(rows) < 2:
        raise SystemExit(f"--prompts {path} holds no prompt; expected one a line, or PartiPrompts")
    return [dict(zip(rows[0], row)) for row in rows[1:]]


def slug(text):
    """Any text -> a short name for every file system; letters that are not ASCII are lost."""
    return re.sub("[^a-z0-9]+", "-", text.lower())[:60].strip("-")


def draw_file(painter, options):
    """A file of prompts -> out/prompts/: pictures, with a digest of prompts, weights and settings
    in their names, and contact sheets (of at most 400 prompts) by category and by challenge.
    What is there is kept, and each group of prompts has random numbers of its own, so that a run
    that was stopped continues as if it had not been."""
    rows, sheets = read_prompts(options.prompts), defaultdict(list)
    weights = [p.flatten()[0].item() for p in painter.parameters()]    # training moves each
    how = (rows, weights, painter.sampling, options.n, options.rerank, options.upsample,
           options.seed, options.dtype)
    digest = hashlib.sha256(repr(how).encode()).hexdigest()[:8]
    rows = rows[:options.limit or None]
    folder = Path(options.out, "prompts")
    folder.mkdir(exist_ok=True)
    for i, row in enumerate(rows, 1):
        stem = f"{i:05d}-{slug(row['Prompt'])}-{digest}"
        row["files"] = [folder / f"{stem}-{k + 1}.png" for k in range(options.n)]
        for column in ("Category", "Challenge"):
            if row.get(column):
                sheets[slug(f"{column} {row[column]}")].append(row)
    size = max(1, BATCH // max(options.n, options.rerank))
    for start in tqdm(range(0, len(rows), size), "groups of prompts"):
        group = rows[start:start + size]
        files = [file for row in group for file in row["files"]]
        if all(file.exists() for file in files):
            continue
        painter.generator.manual_seed(options.seed + start)
        pictures = painter.paint([row["Prompt"] for row in group]).mul(255).round().byte()
        for file, picture in zip(files, pictures.flatten(0, 1).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(picture).save(f"{file}.tmp", "PNG")
            os.replace(f"{file}.tmp", file)    # a kill leaves no half picture
    for name, part in sheets.items():
        small = np.array([[Image.open(file).resize((128, 128), Image.BOX) for file in row["files"]]
                          for row in part[:400]])
        pictures = torch.from_numpy(small).permute(0, 1, 4, 2, 3) / 255
        save_grid(folder / f"{name}.png", pictures, [row["Prompt"] for row in part[:400]])
    say(f"{folder}: pictures ...-{digest}-*.png, contact sheets {', '.join(sheets) or 'none'}")


# ---------------------------------------------------------------------------------------------
# Measuring

def wilson(right, n):
    """95 % interval (low, high) of a share right / n, after Wilson."""
    z = 1.959964
    centre, square = right + z * z / 2, right * (n - right) / n + z * z / 4
    return [(centre + sign * z * square ** 0.5) / (n + z * z) for sign in (-1, 1)]


def frechet(mu1, s1, mu2, s2):
    """Distance of two Gaussians with means (D,) and covariances (D, D), in float64:
    |mu1 - mu2|^2 + tr s1 + tr s2 - 2 tr (s1 s2)^(1/2). The last trace is the sum of the roots of
    the eigenvalues of s1 s2, which are real and not negative but for rounding."""
    mu1, s1, mu2, s2 = (x.double() for x in (mu1, s1, mu2, s2))
    cross = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def moments(features):
    """List of features (b, D) -> their mean (D,) and covariance (D, D) in float64."""
    x = torch.cat(features).double()
    return x.mean(0), torch.cov(x.T)


def load_inception(path, device):
    """NVIDIA's TorchScript Inception -> function of pictures (b, 3, H, W) in [0, 1], which it
    resizes itself, that gives features (b, 2048) on the CPU. SystemExit if it is something else."""
    def features(images):
        return net((255 * images.to(device)).round().byte(), return_features=True).cpu()

    with explain(f"--inception {path}", "NVIDIA's inception-2015-12-05.pt"):
        net = torch.jit.load(path, device).eval()    # deprecated by torch, but this is TorchScript
        features(torch.zeros(1, 3, 299, 299))
    return features


def held_out(dataset, n, seed, what):
    """Yields uint8 pictures (b, 3, S, S) and captions, n samples in all."""
    steps = -(-n // BATCH)
    stream = batches(dataset, min(BATCH, n), seed, 0, steps)
    for images, captions in tqdm(stream, what, steps, leave=False):
        yield images[:n], captions[:n]
        n -= BATCH


def reference(inception, dataset, n, options):
    """Moments of the features of n real pictures, kept in out/ under a digest of the network and
    of every pixel."""
    digest = hashlib.sha256(Path(options.inception).read_bytes())
    for images, _ in held_out(dataset, n, options.seed, "digest"):
        digest.update(images.numpy())
    path = Path(options.out, f"fid-{digest.hexdigest()[:16]}.pt")
    if not path.exists():
        real = held_out(dataset, n, options.seed, "reference")
        torch.save(moments([inception(images / 255) for images, _ in real]), f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    return vqgan.read(path)


def measure(painter, dataset, n, guidance=None, inception=None):
    """Yields (guidance, candidates, measure), [value of each picture] of n held-out samples, batch
    after batch. What all have in common, a FID for instance, comes last, n times.

    Without `guidance`, which overrides the usual one, tokenizer, prior, kinds of scenes and, with
    `inception`, FID are measured, too."""
    whole, made, codes, features = guidance is None, {}, [], defaultdict(list)
    scale = painter.sampling.get("guidance") if whole else guidance
    candidates = painter.options.rerank or (1 if whole or not painter.ranker else 8)
    for images, captions in held_out(dataset, n, painter.options.seed, f"guidance {scale}"):
        if whole:    # made: {(guidance, candidates, what): pictures (b, 3, S, S)}
            real = images.to(painter.device) / 255
            tokens = painter.vqgan.encode(real)                            # (b, N)
            codes.append(tokens.cpu())
            copies = made["", "", "reconstruction "] = painter.decoder.decode(tokens).clamp(0, 1)
            decibels = vqgan.psnr(real, copies)
            yield ("", "", "tokenizer: PSNR, dB"), decibels.tolist()
            yield ("", "", "tokenizer: MSE"), (10 ** (-decibels / 10)).tolist()
        if whole and painter.prior:
            with painter.autocast:
                logits = painter.prior(painter.text(captions).to(painter.device), tokens)
            loss = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").mean(1)
            yield ("", "", "prior: cross-entropy, nats per token"), loss.tolist()
        if painter.prior:
            drawn = painter.draw(captions, candidates, guidance=scale)
            for m in sorted({1, candidates}):
                pictures, scores = best(*(x[:, :m] for x in drawn), 1)
                made[scale, m, ""] = pictures[:, 0]
                if painter.ranker:
                    yield (scale, m, "text-image cosine"), scores[:, 0].tolist()
        for (*key, what), pictures in made.items():
            if whole and inception:
                features[*key, "rFID" if what else "FID"].append(inception(pictures))
            for picture, caption in zip(pictures, captions) if isinstance(dataset, Scenes) else ():
                groups = ["all", kind(caption)] + ["background named"] * (" on " in caption)
                right = check(picture, caption)
                for group in groups if whole else groups[:1]:
                    yield (*key, f"{what}right: {group}"), [right]
    if whole:
        usage = vqgan.codebook_usage(torch.cat(codes), painter.vqgan.config.codes)
        for name, value in zip((f"usage, {min(n, 256)} pictures", "perplexity"), usage):
            yield ("", "", f"tokenizer: codebook {name}"), [value] * n
    if features and n > 1:
        say(f"FID of {n} pictures" + ", degenerate below 2,048: do not compare it" * (n < 2048))
        real = reference(inception, dataset, n, painter.options)
        for key, parts in features.items():
            yield key, [frechet(*real, *moments(parts))] * n


def evaluate(painter, options):
    """Measure what is in out/, on built-in scenes or --data -> a table and out/evaluate.csv. Ctrl-C
    ends the measuring, not the table. The sweep over guidance, with a fifth of the captions, also
    compares best of 8 (or of --rerank) with the first where there is a ranker, and draws the same
    captions at every scale, out/guidance.png."""
    trained = {} if options.data else painter.saved.get("val", {})    # what it was trained on
    data = options.data or trained.get("data")
    captions = options.captions or trained.get("captions")
    inception = load_inception(options.inception, painter.device) if options.inception else None
    splits = {split: open_data(data, captions, painter.vqgan.config.image_size, prior_crop, split,
                               options.seed)
              for split in (["held-out"] if data else ["seen", "combination", "pair"])}
    n, table = min(options.limit or 512, *map(len, splits.values())), defaultdict(list)
    sweep = SWEEP if painter.prior and not data else ()
    try:
        for scale, split in tqdm([*product((None, *sweep), splits)], "measurements"):
            some, name = (n, "") if scale is None else (max(1, n // 5), "sweep: ")
            for key, values in measure(painter, splits[split], some, scale, inception):
                table[name + split, *key] += values
        if sweep:
            texts = splits["pair"].captions(8)
            rows = [painter.draw(texts, guidance=scale)[0][:, 0] for scale in sweep]
            save_grid(Path(options.out, "guidance.png"), rows, [f"guidance {x}" for x in sweep])
    except KeyboardInterrupt:
        say("stopped; what has been measured so far:")
    names = "split guidance candidates measure n value low high".split()
    with open(Path(options.out, "evaluate.csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for key, values in table.items():
            row = [sum(values) / len(values)]    # and of a share its 95 % interval
            row += wilson(sum(values), len(values)) if isinstance(values[0], bool) else []
            writer.writerow([*key, len(values), *row])
            shown = "".join(f"{x:10.4g}" for x in row)
            print("{:18} {!s:4} {!s:3} {:40} {:6}{}".format(*key, len(values), shown))
    print(f"columns: {', '.join(names)}; low and high: 95 % interval after Wilson. {file.name}")


@torch.no_grad()
def main():
    options, _, _ = parse(__doc__, Options())
    if [bool(options.words), bool(options.prompts), options.evaluate].count(True) != 1:
        raise SystemExit("no prompt, or too much at once: expected prompts, --prompts FILE or "
                         '--evaluate; try: python sample.py "a red circle above a blue square"')
    idle = ["upsample"] if options.evaluate else ["data", "captions", "inception"]
    for name in idle + ["limit"] * bool(options.words):
        if getattr(options, name):
            raise SystemExit(f"--{name} has no effect on what is asked for: see --help")
    painter = Painter(options)
    if options.evaluate:
        evaluate(painter, options)
    elif options.prompts:
        draw_file(painter, options)
    else:
        prompts, path = [clean(word) for word in options.words], Path(options.out, "samples.png")
        labels = [" ".join(prompt.split()) or "(no text)" for prompt in prompts]
        save_grid(path, painter.paint(prompts), labels)
        print(path)


if __name__ == "__main__":
    launch(main)
