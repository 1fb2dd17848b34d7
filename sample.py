"""Draw pictures from prompts, look inside, or measure what was trained (Parti §2.4, §5).

    python sample.py "a red circle above a blue square" "two green crosses"   # out/samples.png
    python sample.py "a red circle above a blue square" --attention --film    # how it was drawn
    python sample.py --prompts PartiPrompts.tsv --rerank 16 --upsample        # out/prompts/
    python sample.py --evaluate                                               # out/evaluate.csv

Drawing: --n pictures a prompt, the best of --rerank M candidates, enlarged with --upsample; the
prompt "" draws without a text. --guidance (lambda of Parti Eq. 1), --temperature, --top-k, --top-p
of the codes: as in prior.pt unless given. --prompts FILE: a prompt a line, or PartiPrompts' TSV.
Looking inside: --attention shows which word each place of the first picture of a prompt attended
to, out/attention.png; --film shows the pictures as they appear, out/samples.gif.
Measuring: 512 pictures, or --limit, of each split of what the prior was trained on; or all of
--data (with --captions, COCO's JSON). Samples are drawn as --rerank and --upsample say.
--inception: NVIDIA's TorchScript file, for FID. --vqgan: the tokenizer, if its file was moved.
Axes: B prompts, M pictures of each, T text tokens, N image tokens on a G x G grid, S pixels.
"""
import argparse
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import vqgan
from data import Scenes, Text, batches, check, open_data, pick, pixels, prior_crop, save_grid
from prior import attention, restore, split_heads

BATCH = 64   # pictures drawn at a time
USUAL = {"n": 4, "rerank": 0, "seed": 0, "limit": 0, "prompts": "", "data": "", "out": "out",
         "captions": "", "inception": "", "vqgan": "", "device": "auto", "dtype": "auto",
         # As in prior.pt if negative.
         "guidance": -1.0, "temperature": -1.0, "top-k": -1, "top-p": -1.0}


# ---------------------------------------------------------------------------------------------
# Drawing

def load_model(path):
    """A checkpoint of train_prior.py -> what is in it, the model, its Text."""
    saved = vqgan.read(path)
    return saved, restore(saved), Text(saved["text"], saved["config"]["text_length"])


def load_parts(options):
    """The checkpoints in --out -> one module on its .device: .tokenizer, with the larger decoder if
    there is one for it (Parti §2.1); .prior with its .text and .sampling, and the .data and
    .captions it learned from; with --rerank .ranker and its .ranker_text; .upsampler, or the
    identity. What draws does it under .autocast.

    SystemExit if the tokenizer is not the one the prior learned from: it would draw noise."""
    out = Path(options.out)
    parts = torch.nn.Module()
    saved, parts.prior, parts.text = load_model(out / "prior.pt")
    parts.data, parts.captions = saved["data"], saved["captions"]
    parts.sampling = saved["sampling"]
    for name in parts.sampling:
        if vars(options)[name] >= 0:    # it was given
            parts.sampling[name] = vars(options)[name]
    path = options.vqgan or saved["vqgan"] or out / "vqgan.pt"
    parts.tokenizer = vqgan.load(path)
    if parts.tokenizer.fingerprint() != saved["fingerprint"]:
        raise SystemExit(f"{out / 'prior.pt'} was trained with another tokenizer than {path}: give "
                         "that one, --vqgan FILE, or train the prior again")
    if (out / "decoder.pt").exists():
        decoder = vqgan.load(out / "decoder.pt")
        if decoder.fingerprint() == saved["fingerprint"]:
            parts.tokenizer = decoder
        else:
            print("decoder.pt is not used: it was trained for another tokenizer")
    if options.rerank:
        _, parts.ranker, parts.ranker_text = load_model(out / "text.pt")
    parts.upsampler = torch.nn.Identity()
    if options.upsample:
        saved = vqgan.read(out / "upsampler.pt")
        parts.upsampler = vqgan.Upsampler(**saved["config"])
        parts.upsampler.load_state_dict(saved["model"])
    parts.device, dtype = pick(options.device, options.dtype, parts.tokenizer.config.width)
    parts.autocast = torch.autocast(parts.device.type, dtype, dtype != torch.float32)
    return parts.to(parts.device)


def rank(parts, caption, pictures):
    """Cosines of a caption with pictures (M, 3, S, S): (M,)."""
    [text] = parts.ranker.embed_text(parts.ranker_text([caption]).to(parts.device))    # (D,)
    return parts.ranker.embed_images(pictures) @ text


def paint(parts, captions, n, candidates=0):
    """B captions -> n pictures each (B, n, 3, S, S) in [0, 1], enlarged if there is an upsampler,
    and their tokens (B, n, N); if there are candidates, the best of these (Parti §2.4)."""
    M = max(n, candidates)
    text = parts.text(captions).repeat_interleave(M, dim=0).to(parts.device)    # (B * M, T)
    with parts.autocast:
        tokens = torch.cat([parts.prior.generate(part, **parts.sampling)
                            for part in tqdm(text.split(BATCH), "drawing", leave=False)])
        pictures = torch.cat([parts.tokenizer.decode(part) for part in tokens.split(BATCH)])
    shown, kept = [], []
    for caption, row, drawn in zip(captions, pictures.clamp(0, 1).split(M), tokens.split(M)):
        if candidates:
            best = rank(parts, caption, row).topk(n).indices                    # (n,)
            row, drawn = row[best], drawn[best]
        shown.append(parts.upsampler(row).clamp(0, 1))
        kept.append(drawn)
    return torch.stack(shown), torch.stack(kept)


def draw_file(parts, options):
    """A file of prompts -> out/prompts/, a picture a file, named by the prompt's number. Of the TSV
    of PartiPrompts (Parti §4.3) the first column counts; its quotes are literal."""
    lines = Path(options.prompts).read_text(encoding="utf-8-sig").split("\n")
    prompts = [line.split("\t")[0].strip() for line in lines if line.strip()]
    if lines[0].startswith("Prompt\t"):
        prompts = prompts[1:]
    folder = Path(options.out, "prompts")
    folder.mkdir(exist_ok=True)
    for i, prompt in enumerate(prompts[:options.limit or None], 1):
        [pictures], _ = paint(parts, [prompt], options.n, options.rerank)
        for k, picture in enumerate(pictures, 1):
            Image.fromarray(pixels(picture)).save(folder / f"{i:05d}-{k}.png")
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
        # Where the values are unit vectors, their weighted sum is the weights.
        unit = torch.eye(k.shape[2]).to(k).expand(*k.shape[:3], -1)         # (B, H, T, T)
        weights.append(attention(q, k, unit, lengths=lengths, fused=False))

    hooks = [block.cross.register_forward_hook(keep) for block in prior.blocks]
    prior(text, tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(weights)


def draw_attention(path, parts, captions, pictures, tokens):
    """One PNG: of each caption its first picture and a tile per word, in which a place is bright if
    the position that predicts it attends to the word (mean over heads, pieces of a word added); a
    row per decoder layer. "(end)" is the token after the words."""
    rows, labels, grid = [], [], parts.prior.config.grid
    for caption, picture, drawn in zip(captions, pictures[:, 0], tokens[:, 0]):
        pieces = parts.text.pieces.encode(caption, out_type=str)[:parts.text.length - 1]
        pieces.append("▁(end)")
        text = parts.text([caption])[:, :len(pieces)].to(parts.device)          # (1, T)
        word = torch.tensor([piece[0] == "▁" for piece in pieces]).cumsum(0) - 1       # (T,)
        words = "".join(pieces).split("▁")[1:]
        weights = cross_attention(parts.prior, text, drawn[None])[:, 0].mean(1)    # (layers, N, T)
        weights = weights @ F.one_hot(word).to(weights)                 # (layers, N, words)
        for number, maps in enumerate(weights.mT, 1):                   # (words, N)
            tiles = (maps / maps.max()).unflatten(1, (1, grid, grid)).expand(-1, 3, -1, -1)
            rows.append([picture, *tiles])
            labels.append([f"layer {number}", *words])
    save_grid(path, rows, labels)


def film(path, pictures, labels, grid):
    """Grid of pictures (B, n, 3, S, S) -> PNG, and GIF, in each frame one row of tokens more, the
    last one for two seconds. The decoder sees all tokens: what is shown is as it will be."""
    frames = []
    for row in range(grid + 1):
        shown = pictures.clone()
        shown[..., row * shown.shape[-1] // grid:, :] = 0.5    # grey: not drawn yet
        save_grid(path, shown, labels)
        frames.append(Image.open(path).copy())
    frames[0].save(path.with_suffix(".gif"), append_images=frames[1:], save_all=True, loop=0,
                   duration=[100] * grid + [2000])


# ---------------------------------------------------------------------------------------------
# Measuring

def frechet(x, y):
    """Distance of the Gaussians fitted to features x and y (n, D) in float64: |mu1 - mu2|^2 +
    tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), which is FID (Parti §5.2). The last trace is the sum of the
    roots of the eigenvalues of S1 S2, which are not negative but for rounding."""
    s1, s2, shift = torch.cov(x.T), torch.cov(y.T), x.mean(0) - y.mean(0)
    cross = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return (shift @ shift + (s1 + s2).trace() - 2 * cross).item()


def wilson(right, n):
    """95 % interval [low, high] of a share right / n, after Wilson."""
    p = right / n
    a = 1.959964 ** 2 / n
    half = (a * (p * (1 - p) + a / 4)) ** 0.5
    return [(p + a / 2 - half) / (1 + a), (p + a / 2 + half) / (1 + a)]


def measure(parts, dataset, n, options, inception):
    """n pictures of a dataset -> {measure: list of values}, of bool where it is a share; what the
    pictures have in common, as FID, stands n times."""
    rows, features, codes = defaultdict(list), defaultdict(list), []
    for images, captions in batches(dataset, n, options.seed, 0, 1, micro=BATCH):
        images = images.to(parts.device) / 255                              # (b, 3, S, S)
        tokens = parts.tokenizer.encode(images)                             # (b, N)
        copies = parts.tokenizer.decode(tokens).clamp(0, 1)                 # (b, 3, S, S)
        codes.append(tokens)
        rows["PSNR dB"] += vqgan.psnr(images, copies).tolist()
        logits = parts.prior(parts.text(captions).to(parts.device), tokens)     # (b, N, K)
        loss = F.cross_entropy(logits.mT, tokens, reduction="none").mean(1)     # (b,)
        rows["cross-entropy nats/token"] += loss.tolist()
        samples = paint(parts, captions, 1, options.rerank)[0][:, 0]            # (b, 3, S, S)
        # Is a sample, in 16 x 16 pixels, nearest to a picture of its own caption?
        drawn, real = (F.adaptive_avg_pool2d(x, 16).flatten(1) for x in (samples, images))
        nearest = torch.cdist(drawn, real).argmin(1)                            # (b,)
        rows[f"sample: nearest to own of {len(real)}"] += [
            captions[i] == caption for i, caption in zip(nearest, captions)]
        made = {"real": images, "reconstruction": copies, "sample": samples}
        for what, pictures in made.items():
            if inception:
                found = inception((255 * pictures).round().byte(), return_features=True)
                features[what].append(found.cpu().double())                     # (b, 2048)
            if isinstance(dataset, Scenes):
                for caption, picture in zip(captions, pictures):
                    rows[f"{what}: right"].append(check(picture, caption))
    usage, perplexity = vqgan.codebook_usage(torch.cat(codes), parts.tokenizer.config.codes)
    rows |= {"usage": [usage] * n, "perplexity": [perplexity] * n}
    for what in ("reconstruction", "sample") if inception else ():
        fid = frechet(torch.cat(features["real"]), torch.cat(features[what]))
        rows[f"{what}: FID (degenerate below 2048 pictures)"] = [fid] * n
    return rows


def evaluate(parts, options):
    """Measures on all of --data; or on the splits of what the prior was trained on, its training
    pictures too, to compare with; or on scenes -> a table, printed and written."""
    data, captions, splits = parts.data, parts.captions, ["held-out", "train"]
    if options.data:
        data, captions, splits = options.data, options.captions, ["all"]
    inception = options.inception and torch.jit.load(options.inception, parts.device).eval()
    size, table = parts.tokenizer.config.image_size, ["split,measure,n,value,low,high"]
    for split in splits if data else ["seen", "pair"]:
        dataset = open_data(data, captions, size, prior_crop, split, options.seed)
        n = min(options.limit or (len(dataset) if options.data else 512), len(dataset))
        for name, values in measure(parts, dataset, n, options, inception).items():
            row = [len(values), sum(values) / len(values)]
            if isinstance(values[0], bool):    # a share, with its 95 % interval
                row += wilson(sum(values), len(values))
            table.append(",".join([split, name, *(f"{x:.5g}" for x in row)]))
            print(table[-1])
    Path(options.out, "evaluate.csv").write_text("\n".join(table))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="PROMPT")
    for name in ("upsample", "attention", "film", "evaluate"):
        parser.add_argument(f"--{name}", action="store_true")
    for name, usual in USUAL.items():
        parser.add_argument(f"--{name}", type=type(usual), default=usual)
    options = parser.parse_intermixed_args()
    if not (options.words or options.prompts or options.evaluate):
        raise SystemExit('no prompt; try: python sample.py "a red circle above a blue square"')
    parts = load_parts(options)
    torch.manual_seed(options.seed)
    if options.evaluate:
        return evaluate(parts, options)
    if options.prompts:
        return draw_file(parts, options)
    path, labels = Path(options.out, "samples.png"), [[prompt] for prompt in options.words]
    pictures, tokens = paint(parts, options.words, options.n, options.rerank)
    save_grid(path, pictures, labels)
    print(path)
    if options.film:
        film(path, pictures, labels, parts.prior.config.grid)
    if options.attention:
        draw_attention(path.with_name("attention.png"), parts, options.words, pictures, tokens)


if __name__ == "__main__":
    main()
