"""Draw pictures from prompts, look inside, or measure what was trained (Parti §2.4, §5).

    python sample.py "a red circle above a blue square" "two green crosses"   # out/samples.png
    python sample.py "a red circle above a blue square" --attention --film    # how it was drawn
    python sample.py --prompts PartiPrompts.tsv --rerank 16 --upsample        # out/prompts/
    python sample.py --evaluate                                               # out/evaluate.csv

Drawing: --n pictures a prompt, the best of --rerank M candidates, enlarged with --upsample; the
prompt "" draws without a text. --guidance (lambda of Parti Eq. 1), --temperature, --top-k, --top-p
of the codes: as in prior.pt unless given. --prompts FILE: a prompt a line, or PartiPrompts' TSV.
Looking inside, for prompts in the command: --attention shows which word each place attended to,
out/attention.png; --film shows the pictures as they appear, out/samples.gif.
Measuring: 512 pictures of each split that is held out from training; or all of --data (with
--captions, COCO's JSON). --limit: at most so many pictures, or prompts of a file. --inception:
NVIDIA's TorchScript file, for FID. --vqgan: another tokenizer file than the prior's.
Axes: B prompts, M pictures of each, T text tokens, N image tokens on a G x G grid, S pixels.
"""
import argparse
import re
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import vqgan
from data import (EOS, PAD, Scenes, Text, batches, check, kind, open_data, pick, pixels,
                  prior_crop, save_grid, say)
from prior import load, split_heads

BATCH = 64   # pictures drawn at a time


# ---------------------------------------------------------------------------------------------
# Drawing

def load_parts(options):
    """The checkpoints in --out -> one module on its .device: .tokenizer; .decoder, the larger one
    if there is one for this tokenizer (Parti §2.1); .prior with its .text, .sampling and the .data
    and .captions it was trained on, or None if there is only a tokenizer to be measured; .ranker
    with its .ranker_text, or None; .upsampler. What draws does it under .autocast.

    SystemExit if the tokenizer is not the one the prior learned from: it would draw noise."""
    out, parts, saved = Path(options.out), torch.nn.Module(), {}
    parts.prior, parts.ranker, parts.upsampler = None, None, torch.nn.Identity()
    if not options.evaluate or (out / "prior.pt").exists():
        parts.prior, saved = load(out / "prior.pt"), vqgan.read(out / "prior.pt")
        parts.text = Text(saved["text"], saved["config"]["text_length"])
        given = {name: vars(options)[name] for name in saved["sampling"]}
        parts.sampling = saved["sampling"] | {k: v for k, v in given.items() if v is not None}
    parts.data, parts.captions = saved.get("data", ""), saved.get("captions", "")
    path = options.vqgan or saved.get("vqgan") or out / "vqgan.pt"
    parts.tokenizer = parts.decoder = vqgan.load(path)
    if parts.prior and saved["fingerprint"] != parts.tokenizer.fingerprint():
        raise SystemExit(f"{out / 'prior.pt'} was trained with another tokenizer than {path}: give "
                         "that one, --vqgan FILE, or train the prior again")
    if (out / "decoder.pt").exists():
        parts.decoder = vqgan.load(out / "decoder.pt")
        if parts.decoder.fingerprint() != parts.tokenizer.fingerprint():
            say(f"{out / 'decoder.pt'} is not used: it was trained for another tokenizer")
            parts.decoder = parts.tokenizer
    if options.rerank or options.evaluate and (out / "text.pt").exists():
        parts.ranker, saved = load(out / "text.pt"), vqgan.read(out / "text.pt")
        parts.ranker_text = Text(saved["text"], saved["config"]["text_length"])
    if options.upsample:
        saved = vqgan.read(out / "upsampler.pt")
        parts.upsampler = vqgan.Upsampler(**saved["config"])
        parts.upsampler.load_state_dict(saved["model"])
    parts.device, dtype = pick(options.device, options.dtype, parts.tokenizer.config.width)
    parts.autocast = torch.autocast(parts.device.type, dtype, dtype != torch.float32)
    return parts.to(parts.device)


def rank(parts, captions, pictures):
    """Cosine of B captions with their pictures (B, M, 3, S, S): (B, M)."""
    text = parts.ranker.embed_text(parts.ranker_text(captions).to(parts.device))  # (B, D)
    images = torch.stack([parts.ranker.embed_images(row) for row in pictures])  # (B, M, D)
    return (text[:, None] * images).sum(-1)


def paint(parts, captions, n, candidates=0):
    """B captions -> n pictures each (B, n, 3, S, S) in [0, 1], enlarged if there is an upsampler,
    and their tokens (B, n, N); if there are candidates, the best of these (Parti §2.4)."""
    text = parts.text(captions).repeat_interleave(max(n, candidates), dim=0).to(parts.device)
    with parts.autocast:
        tokens = [parts.prior.generate(part, **parts.sampling)
                  for part in tqdm(text.split(BATCH), "drawing", delay=3, leave=False)]
        pictures = [parts.decoder.decode(part).clamp(0, 1) for part in tokens]
    pictures, tokens = [torch.cat(x).unflatten(0, (len(captions), -1)) for x in (pictures, tokens)]
    if candidates:
        order = rank(parts, captions, pictures).argsort(1, descending=True)[:, :n]  # (B, n)
        rows = torch.arange(len(order))[:, None]
        pictures, tokens = pictures[rows, order], tokens[rows, order]
    return torch.stack([parts.upsampler(row) for row in pictures]), tokens


def draw_file(parts, options):
    """A file of prompts -> out/prompts/, a picture a file, named by number and prompt. Of the TSV
    of PartiPrompts (Parti §4.3) the first column counts; its quotes are literal."""
    lines = Path(options.prompts).read_text(encoding="utf-8-sig").split("\n")
    if lines[0].startswith("Prompt\t"):
        lines = [line.split("\t")[0] for line in lines[1:]]
    prompts = [line.strip() for line in lines if line.strip()][:options.limit]
    folder = Path(options.out, "prompts")
    folder.mkdir(exist_ok=True)
    for i, prompt in enumerate(tqdm(prompts, "prompts"), 1):
        slug = re.sub("[^a-z0-9]+", "-", prompt.lower())[:60].strip("-")
        [pictures], _ = paint(parts, [prompt], options.n, options.rerank)
        for k, picture in enumerate(pictures, 1):
            Image.fromarray(pixels(picture)).save(folder / f"{i:05d}-{slug}-{k}.png")
    print(folder)


# ---------------------------------------------------------------------------------------------
# Looking inside

def cross_attention(prior, text, tokens):
    """How much the position that predicts each image token attends to each text token: text (B, T),
    tokens (B, N) -> weights (layers, B, H, N, T), rows of sum 1, padding 0.

    Computed again from the queries and keys of each layer while the finished picture passes
    through: what draws keeps no weights."""
    weights = []

    def keep(cross, inputs, _):
        x, words, lengths = inputs                                          # x (B, N, D)
        [q] = split_heads(cross.q(x), 1, cross.heads)                       # (B, H, N, d)
        k, _ = split_heads(cross.kv(words), 2, cross.heads)                 # (B, H, T, d)
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5                   # (B, H, N, T)
        padding = torch.arange(words.shape[1], device=x.device) >= lengths[:, None, None, None]
        weights.append(scores.masked_fill(padding, -torch.inf).softmax(-1))

    hooks = [block.cross.register_forward_hook(keep) for block in prior.blocks]
    prior(text, tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(weights)


def draw_attention(path, parts, captions, pictures, tokens):
    """One PNG: of each caption its first picture and a tile per word, in which a place is bright if
    the position that predicts it attends to the word (mean over heads, pieces of a word added); a
    row per decoder layer. "(end)" is the token after the words."""
    rows, pieces, grid = [], parts.text.pieces, parts.prior.config.grid
    for caption, picture, drawn in zip(captions, pictures[:, 0], tokens[:, 0]):
        ids = [token for token in parts.text([caption])[0].tolist() if token] or [PAD]
        text = torch.tensor(ids, device=tokens.device)                      # (T,)
        starts = [i for i, token in enumerate(ids)
                  if token == EOS or pieces.id_to_piece(token).startswith("▁")][1:]
        words = [pieces.decode(part.tolist()) or "(end)" for part in text.tensor_split(starts)]
        weights = cross_attention(parts.prior, text[None], drawn[None])
        for number, layer in enumerate(weights[:, 0].mean(1), 1):           # (N, T)
            maps = torch.stack([part.sum(1) for part in layer.tensor_split(starts, 1)])
            tiles = (maps / maps.max()).unflatten(1, (1, grid, grid)).expand(-1, 3, -1, -1)
            rows.append([(f"layer {number}", picture), *zip(words, tiles)])
    sheet = Image.new("RGB", (100 * max(map(len, rows)), 116 * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, (label, tile) in enumerate(row):
            tile = Image.fromarray(pixels(tile)).resize((96, 96), Image.NEAREST)
            sheet.paste(tile, (100 * x, 116 * y))
            ImageDraw.Draw(sheet).text((100 * x, 116 * y + 98), label[:15], "black")
    sheet.save(path)


def film(path, pictures, labels, grid):
    """Grid of pictures (B, n, 3, S, S) -> GIF, in each frame one row of tokens more, the last frame
    for two seconds. The decoder sees all tokens: what is shown is already as it will be."""
    frames, still, size = [], path.with_suffix(".png"), pictures.shape[-1]
    for row in range(grid + 1):
        shown = pictures.clone()
        shown[..., row * size // grid:, :] = 0.5    # grey: not drawn yet
        save_grid(still, shown, labels)
        frames.append(Image.open(still).copy())
    frames[0].save(path, append_images=frames[1:], save_all=True, loop=0,
                   duration=[100] * grid + [2000])


# ---------------------------------------------------------------------------------------------
# Measuring

def small(images):
    """(b, 3, S, S) -> (b, 768), reduced to 16 x 16 pixels: what `measure` calls near."""
    return F.interpolate(images, (16, 16), mode="area").flatten(1)


def frechet(x, y):
    """Distance of the Gaussians fitted to features x and y (n, D) in float64: |mu1 - mu2|^2 +
    tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), which is FID (Parti §5.2). The last trace is the sum of the
    roots of the eigenvalues of S1 S2, which are not negative but for rounding."""
    s1, s2, shift = torch.cov(x.T), torch.cov(y.T), x.mean(0) - y.mean(0)
    cross = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return (shift.square().sum() + s1.trace() + s2.trace() - 2 * cross).item()


def wilson(right, n):
    """95 % interval [low, high] of a share right / n, after Wilson."""
    z = 1.959964
    centre, half = right + z * z / 2, z * (right * (n - right) / n + z * z / 4) ** 0.5
    return [(centre - half) / (n + z * z), (centre + half) / (n + z * z)]


def measure(parts, dataset, n, options, inception):
    """n pictures of a dataset -> {measure: list of values}, of bool where it is a share; what the
    pictures have in common, as FID, stands n times."""
    rows, codes, features, pairs = defaultdict(list), [], defaultdict(list), {}
    for images, captions in tqdm(batches(dataset, n, options.seed, 0, 1, micro=BATCH), leave=False):
        images = images.to(parts.device) / 255
        tokens = parts.tokenizer.encode(images)                             # (b, N)
        copies = parts.decoder.decode(tokens).clamp(0, 1)                   # (b, 3, S, S)
        codes.append(tokens)
        rows["PSNR dB"] += vqgan.psnr(images, copies).tolist()
        rows["MSE"] += (images - copies).square().mean((1, 2, 3)).tolist()
        made = {"real": images, "reconstruction": copies}
        if parts.prior:
            logits = parts.prior(parts.text(captions).to(parts.device), tokens)  # (b, N, K)
            loss = F.cross_entropy(logits.mT, tokens, reduction="none").mean(1)  # (b,)
            rows["cross-entropy nats/token"] += loss.tolist()
            made["sample"] = paint(parts, captions, 1)[0][:, 0]
            pairs |= zip(captions, zip(small(images), small(made["sample"])))
            if options.rerank:
                made["best sample"] = paint(parts, captions, 1, options.rerank)[0][:, 0]
        for what, pictures in made.items():
            if parts.ranker:
                rows[f"{what}: cosine"] += rank(parts, captions, pictures[:, None])[:, 0].tolist()
            for caption, picture in zip(captions, pictures) if isinstance(dataset, Scenes) else ():
                rows[f"{what}: right"].append(check(picture, caption))
                if dataset.split == "seen":    # which alone has all kinds
                    rows[f"{what}: right ({kind(caption)})"].append(rows[f"{what}: right"][-1])
            if inception:
                found = inception(pictures.mul(255).round().byte(), return_features=True)
                features[what].append(found.cpu().double())                       # (b, 2048)
    usage, perplexity = vqgan.codebook_usage(torch.cat(codes), parts.tokenizer.config.codes)
    rows[f"usage of {min(n, 256)} pictures"], rows["perplexity"] = [usage] * n, [perplexity] * n
    for what, found in features.items():
        fid = frechet(torch.cat(features["real"]), torch.cat(found))
        rows[f"{what}: FID (degenerate below 2048 pictures)"] = [fid] * n
    pairs = [pair for caption, pair in pairs.items() if caption][:64]
    if pairs and not isinstance(dataset, Scenes):
        nearest = torch.cdist(*(torch.stack(x) for x in zip(*pairs))).argmin(0).tolist()
        rows[f"sample: nearest to own of {len(pairs)}"] = [i == j for i, j in enumerate(nearest)]
    return rows


def evaluate(parts, options):
    """Measures on all of --data; or on the splits of what the prior was trained on, its training
    pictures too, to compare with; or on scenes -> a table, printed and written."""
    data, captions, splits = parts.data, parts.captions, ["held-out", "train"]
    if options.data:
        data, captions, splits = options.data, options.captions or "", ["all"]
    size, table = parts.tokenizer.config.image_size, ["split,measure,n,value,low,high"]
    inception = options.inception and torch.jit.load(options.inception, parts.device).eval()
    for split in splits if data else ["seen", "pair"]:
        dataset = open_data(data, captions, size, prior_crop, split, options.seed)
        n = min(options.limit or (len(dataset) if options.data else 512), len(dataset))
        say(f"{n} pictures of {data or 'built-in scenes'}, split {split}")
        for name, values in measure(parts, dataset, n, options, inception).items():
            row = [sum(values) / len(values)]
            if isinstance(values[0], bool):    # a share, with its 95 % interval
                row += wilson(sum(values), len(values))
            table.append(",".join([split, name, str(len(values)), *(f"{x:.5g}" for x in row)]))
            print(table[-1])
    Path(options.out, "evaluate.csv").write_text("\n".join(table), encoding="utf-8")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="PROMPT")
    for name in ("upsample", "attention", "film", "evaluate"):
        parser.add_argument(f"--{name}", action="store_true")
    forms = {float: "guidance temperature top-p", int: "n rerank top-k seed limit",
             str: "prompts data captions inception vqgan out device dtype"}
    for form, names in forms.items():
        for name in names.split():
            parser.add_argument(f"--{name}", type=form)    # None if it is not given
    parser.set_defaults(n=4, rerank=0, seed=0, out="out", device="auto", dtype="auto")
    options = parser.parse_intermixed_args()
    if not (options.words or options.prompts or options.evaluate):
        raise SystemExit('no prompt; try: python sample.py "a red circle above a blue square"')

    parts, out = load_parts(options), Path(options.out)
    torch.manual_seed(options.seed)
    if options.evaluate:
        return evaluate(parts, options)
    if options.prompts:
        return draw_file(parts, options)
    pictures, tokens = paint(parts, options.words, options.n, options.rerank)
    save_grid(out / "samples.png", pictures, options.words)
    print(out / "samples.png")
    if options.attention:
        draw_attention(out / "attention.png", parts, options.words, pictures, tokens)
    if options.film:
        film(out / "samples.gif", pictures, options.words, parts.tokenizer.config.grid)


if __name__ == "__main__":
    main()
