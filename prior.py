"""Stage 2, the prior: text tokens to image tokens, one after the other (Parti, arXiv 2206.10789).

    python prior.py                      # walk-through: shapes, speed, sizes of Table 1
    torchrun train_prior.py              # train the tiny one on the built-in scenes

Top to bottom: configuration, the encoder-decoder transformer with its cached twin, sampling, the
contrastive text-image model, the optimiser, initial values, and the attention that all of them
share. Axes: B batch, T text tokens, N image tokens, H heads, D width, d head width, K codebook
entries, G grid side.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import distributed as dist, nn
from torch.distributed._functional_collectives import all_gather_single_autograd

from vqgan import Tower, VQGANConfig, patchify, read

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # no Triton: torch's own attention serves
    triton = None

# --- configuration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of the encoder-decoder transformer (Parti §2.2, Table 1).

    Raises ValueError, one line naming the values, for sizes that do not fit together."""

    text_vocab: int = 16_000  # SentencePiece pieces
    text_length: int = 128  # longest text, in tokens
    codes: int = 8_192  # K, entries of the tokenizer's codebook
    grid: int = 32  # G, image tokens along a side; N = G * G
    width: int = 1_024
    heads: int = 16
    mlp: int = 4_096
    encoder_layers: int = 12
    decoder_layers: int = 12
    dropout: float = 0.1  # on residual, activation and attention outputs (§3, ViT-VQGAN §4.1)
    kernel: int = 11  # side of the conv-shaped attention mask (§2.2), odd; 0: dense causal

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")

    @property
    def tokens(self):
        """N: image tokens of one picture."""
        return self.grid**2


TINY = PriorConfig(text_length=32, grid=8, width=128, heads=8, mlp=512, encoder_layers=2,
                   decoder_layers=4, dropout=0.0)
PRESETS = {  # Parti Table 1; tiny is for the built-in scenes, mini for a laptop's own pictures
    "tiny": TINY,
    "mini": replace(TINY, text_length=64, grid=16),
    "350m": PriorConfig(),
    "750m": PriorConfig(decoder_layers=36),
    "3b": PriorConfig(width=2_048, heads=32, mlp=8_192, decoder_layers=36),
    "20b": PriorConfig(width=4_096, heads=64, mlp=16_384, encoder_layers=16, decoder_layers=64),
}
MASK = 1  # hides a token in pretraining: SentencePiece's "unknown", free as bytes spell all words

# --- the transformer -----------------------------------------------------------------------------


def split_heads(x, parts, heads):
    """(B, N, parts * D) -> (parts, B, H, N, d): queries, keys, values."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def linear_float32(x, weight):
    """x (..., n), weight (m, n) -> x weight^T (..., m), both and the result in float32, also under
    autocast: what leaves a model is float32 (Parti §3)."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight)


class Attention(nn.Module):
    """Multi-head attention without biases; queries from x, keys and values from a context (Parti
    §2.2, which takes the encoder-decoder of Vaswani et al.). rule: causal, kernel and grid of
    `attention`; without them a query sees all."""

    def __init__(self, config, *rule):
        super().__init__()
        self.heads, self.rule = config.heads, rule
        D = config.width
        self.q, self.kv, self.out = (nn.Linear(D, n * D, bias=False) for n in (1, 2, 1))

    def forward(self, x, context, lengths=None):
        """x (B, Nq, D), context (B, Nk, D), of which lengths (B,) count -> (B, Nq, D)."""
        [q] = split_heads(self.q(x), 1, self.heads)                     # (B, H, Nq, d)
        k, v = split_heads(self.kv(context), 2, self.heads)             # (B, H, Nk, d)
        y = attention(q, k, v, *self.rule, lengths=lengths)             # (B, H, Nq, d)
        return self.out(y.transpose(1, 2).flatten(2))                   # (B, Nq, D)


class Block(nn.Module):
    """Pre-norm block: self-attention, in the decoder cross-attention to the text, MLP (Parti §2.2;
    dropout §3). The decoder's self-attention is causal and sparse, the encoder's sees all."""

    def __init__(self, config, cross=False):
        super().__init__()
        D, M = config.width, config.mlp
        rule = (True, config.kernel, config.grid) if cross else ()
        self.norm1, self.attention = nn.LayerNorm(D), Attention(config, *rule)
        if cross:
            self.norm2, self.cross = nn.LayerNorm(D), Attention(config)
        self.norm3 = nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, M, bias=False), nn.Linear(M, D, bias=False)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, lengths=None, text=None, text_lengths=None):
        """x (B, N, D), of which lengths (B,) count -> (B, N, D). In the decoder text is (B, T, D),
        of which text_lengths (B,) count."""
        h = self.norm1(x)
        x = x + self.drop(self.attention(h, h, lengths))
        if text is not None:
            h = self.norm2(x)
            x = x + self.drop(self.cross(h, text, text_lengths))
        h = self.norm3(x)
        h = self.drop(F.gelu(self.up(h)))
        return x + self.drop(self.down(h))


class CachedBlock:
    """A decoder block again, for one position at a time and without dropout: keys and values of the
    past are kept in `size` slots, not computed again, and those of the text, features words
    (B, T, D), are computed once. Under autocast weights and, on a GPU, the cache are in half
    precision; all else is float32."""

    def __init__(self, block, words, size):
        attention, cross, rows = block.attention, block.cross, len(words)
        self.block, self.heads = block, attention.heads
        text = split_heads(cross.kv(words), 2, self.heads).contiguous()  # (2, B, H, T, d)
        dtype = text.dtype  # which autocast chose
        self.text = text if text.is_cuda else text.float()
        self.past = self.text.new_zeros(*text.shape[:3], size, text.shape[-1])
        self.qkv = few_rows(torch.cat([attention.q.weight, attention.kv.weight]), dtype, rows)
        self.out = few_rows(attention.out.weight, dtype, rows)
        self.cross_q = few_rows(cross.q.weight, dtype, rows)
        self.cross_out = few_rows(cross.out.weight, dtype, rows)
        self.up = few_rows(block.up.weight, dtype, rows)
        self.down = few_rows(block.down.weight, dtype, rows)

    def step(self, x, slot, seen, inside):
        """Block.forward for one position, x (B, D) -> (B, D). Its keys and values go to the slot, a
        tensor (1,); seen (1, size), inside (B, 1, 1, T) are the masks, added to the scores."""
        h = self.block.norm1(x)
        qkv = split_heads(self.qkv(h)[:, None], 3, self.heads).to(self.past)  # (3, B, H, 1, d)
        self.past.index_copy_(3, slot, qkv[1:])
        y = look(qkv[0], *self.past, seen)                              # (B, H, 1, d)
        x = x + self.out(y.flatten(1))                                  # (B, D)
        h = self.block.norm2(x)
        [q] = split_heads(self.cross_q(h)[:, None], 1, self.heads).to(self.text)
        y = look(q, *self.text, inside)                                 # (B, H, 1, d)
        x = x + self.cross_out(y.flatten(1))                            # (B, D)
        h = self.block.norm3(x)
        h = F.gelu(self.up(h))
        return x + self.down(h)


def look(q, k, v, mask):
    """Attention of one query (B, H, 1, d). On a CPU written out: torch's would scale all keys."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask)  # scores in float32
    scores = (q * q.shape[-1] ** -0.5) @ k.mT + mask                    # (B, H, 1, slots)
    return scores.softmax(-1) @ v


def few_rows(weight, dtype, rows):
    """-> a function of x (rows, n_in) that gives x weight^T (rows, n_out). Few rows take as long as
    reading the weight (n_out, n_in), kept in dtype; then a CPU has faster ways than F.linear. Half
    precision is float16 there, faster than bfloat16, and ends at 65,504."""
    if weight.is_cpu and dtype == torch.float32:  # MKL multiplies W x^T faster than x W^T
        if weight.shape[1] % 512 or weight.shape[1] == 512:
            return lambda x: (weight @ x.contiguous().t()).t()
        blocks = torch.stack(weight.split(512, 1))  # long rows in blocks: (n_in / 512, n_out, 512)
        return lambda x: (blocks @ x.contiguous().view(rows, -1, 512).permute(1, 2, 0)).sum(0).t()
    if weight.is_cpu and rows <= 16 and torch.backends.quantized.engine == "x86":
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)  # sums in float32
    weight = weight.to(dtype)
    return lambda x: F.linear(x.to(dtype), weight)


class TextEncoder(nn.Module):
    """text (B, T) int64, 0 = padding -> features (B, T, D), lengths (B,) (Parti §2.2).

    A text of padding alone is the unconditional case: its first position stays visible, so that the
    embedding of the padding there is the learned stand-in for "no text" (§2.4)."""

    def __init__(self, config):
        super().__init__()
        self.embed = nn.Embedding(config.text_vocab, config.width)
        self.positions = nn.Parameter(torch.empty(config.text_length, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.width)  # the additional norm of Parti §3
        self.drop = nn.Dropout(config.dropout)

    def forward(self, text):
        if text.shape[1] > len(self.positions):
            raise ValueError(f"text {tuple(text.shape)}: give (B, T), T <= {len(self.positions)}")
        lengths = (text != 0).sum(1).clamp(min=1)                       # (B,)
        x = self.drop(self.embed(text) + self.positions[: text.shape[1]])   # (B, T, D)
        for block in self.blocks:
            x = block(x, lengths)
        return self.norm(x), lengths


class Parti(nn.Module):
    """Text tokens to image tokens: encoder, decoder, one distribution over codes at a time (Parti
    §2.2)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config)
        self.embed = nn.Embedding(config.codes, config.width)
        self.start = nn.Parameter(torch.empty(config.width))  # stands before the first image token
        self.rows = nn.Parameter(torch.empty(config.grid, 1, config.width))
        self.columns = nn.Parameter(torch.empty(1, config.grid, config.width))
        self.blocks = nn.ModuleList(Block(config, True) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)  # the additional norm of Parti §3
        self.head = nn.Linear(config.width, config.codes, bias=False)
        self.drop = nn.Dropout(config.dropout)
        initialise(self)

    @torch.no_grad()
    def start_from(self, codes):
        """Start the image embeddings and the output map as random projections of the tokenizer's
        unit codes (K, code_dim), so that codes that look alike start alike; our addition."""
        into, out = torch.randn(2, codes.shape[1], self.config.width)
        self.embed.weight.copy_(codes @ into)
        self.head.weight.copy_(codes @ out * self.config.width**-0.5)

    def positions(self):
        """Learned row + column vectors, one sum per image token: (N, D)."""
        return (self.rows + self.columns).flatten(0, 1)

    def logits(self, x):
        """(B, N, D) -> (B, N, K) in float32, also under autocast (Parti §3)."""
        return linear_float32(self.norm(x), self.head.weight)

    def forward(self, text, tokens):
        """text (B, T), tokens (B, N) -> logits (B, N, K); those at i saw tokens before i only."""
        words, lengths = self.encoder(text)                             # (B, T, D)
        start = self.start.expand(len(tokens), 1, -1)                   # (B, 1, D)
        x = torch.cat([start, self.embed(tokens[:, :-1])], dim=1)       # (B, N, D)
        x = self.drop(x + self.positions())
        for block in self.blocks:
            x = block(x, text=words, text_lengths=lengths)
        return self.logits(x)                                           # (B, N, K)

    def generate(self, text, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, generator=None):
        """text (B, T) -> image tokens (B, N), drawn one after the other with a cache (Parti §2.4).

        guidance: lambda of Parti Eq. 1; 1 is plain conditional sampling and costs half as much.
        temperature (0: always the likeliest code), top_k (0: off), top_p (1: off) act after it.
        generator: of random numbers, on the same device. The model should be in eval mode."""
        guided = guidance != 1.0  # two streams in one batch: the second has no text
        both = torch.cat([text, torch.zeros_like(text)]) if guided else text
        tokens = text.new_full((len(text), 1 + self.config.tokens), self.config.codes)  # the start
        with torch.inference_mode():  # cheaper operations: what they make can never be trained
            step = CachedDecoder(self, both)
            for i in range(self.config.tokens):
                logits = step(i, tokens[:, i].repeat(1 + guided))       # (B or 2B, K)
                if guided:
                    logits = guide(*logits.chunk(2), guidance)
                p = truncate(logits / max(temperature, 1e-8), top_k, top_p).softmax(-1)
                tokens[:, i + 1] = torch.multinomial(p, 1, generator=generator)[:, 0]
        return tokens[:, 1:]


class CachedDecoder:
    """The decoder of a Parti in eval mode, one position at a time; use it under torch.no_grad().

    With the conv-shaped mask no query sees further back than `conv_offsets` reach: the cache is a
    ring of that many slots and the cost of a token does not grow with its position. Under autocast
    weights are kept in half precision. On a GPU all kernels of a step are one CUDA graph."""

    def __init__(self, prior, text):
        config, device = prior.config, text.device
        words, lengths = prior.encoder(text)                            # (B, T, D)
        i = torch.arange(config.tokens, device=device)[:, None]         # (N, 1)
        rule = config.tokens, True, config.kernel, config.grid
        self.size = 1 + i[allowed(i, 0, *rule)].max().item()  # no later query sees position 0
        self.blocks = [CachedBlock(block, words, self.size) for block in prior.blocks]
        self.norm, self.head = prior.norm, few_rows(prior.head.weight, torch.float32, len(text))
        self.embed = torch.cat([prior.embed.weight, prior.start[None]])  # token K is the start
        self.positions = prior.positions()                              # (N, D)
        # At position i slot s holds the key of the last position j = s (mod size) up to i. What is
        # added to scores is 0 = log 1 for the keys to see, and -inf = log 0.
        j = i - (i - torch.arange(self.size, device=device)) % self.size
        inside = torch.arange(words.shape[1], device=device) < lengths[:, None, None, None]
        self.seen = allowed(i, j, *rule).to(self.blocks[0].past).log()  # (N, size)
        self.inside = inside.to(self.blocks[0].past).log()              # (B, 1, 1, T)
        self.i, self.tokens = text.new_zeros(1), text.new_zeros(len(text))
        self.graph = torch.cuda.CUDAGraph() if text.is_cuda else None
        if self.graph:
            self.step()  # once outside of the graph: libraries set themselves up
            # Other threads, such as one that pins a loader's memory, may go on meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = self.step()

    def __call__(self, i, tokens):
        """Position i and the tokens (B,) before it (K at position 0) -> logits (B, K)."""
        self.i.fill_(i)
        self.tokens.copy_(tokens)
        if not self.graph:
            return self.step()
        self.graph.replay()
        return self.logits.clone()

    def step(self):
        """Parti.forward for position self.i, which follows self.tokens: on a GPU always the same
        kernels on the same memory."""
        with torch.autocast(self.i.device.type, enabled=False):  # the weights are cast already
            x = self.embed[self.tokens] + self.positions[self.i]        # (B, D)
            slot, seen = self.i % self.size, self.seen[self.i]
            for block in self.blocks:
                x = block.step(x, slot, seen, self.inside)
            return self.head(self.norm(x))                              # (B, K)


# --- sampling ------------------------------------------------------------------------------------


def guide(conditional, unconditional, scale):
    """Guided logits, Parti Eq. 1: scale 1 is conditional, 0 unconditional sampling."""
    return unconditional + scale * (conditional - unconditional)


def truncate(logits, top_k=0, top_p=1.0):
    """(B, K) with -inf outside the top_k likeliest codes and outside the smallest set of codes that
    holds top_p of the probability; the likeliest code always stays."""
    if not top_k and top_p >= 1:
        return logits
    values, order = logits.sort(descending=True)
    if top_k:
        values[:, top_k:] = -math.inf
    p = values.softmax(-1)
    before = p.cumsum(-1) - p  # what the likelier codes hold
    values[:, 1:][before[:, 1:] >= top_p] = -math.inf
    return logits.scatter(1, order, values)


# --- contrastive text-image model -----------------------------------------------------------------


class DualEncoder(nn.Module):
    """Text and image tower of the contrastive pretraining (Parti §2.3) and of the reranker (§2.4).

    The text tower is Parti's own encoder, so that its weights warm-start the prior; masked tokens
    train it too. The image tower, a ViT as the tokenizer's, is thrown away for the prior.
    image_size, patch: of the pictures (B, 3, S, S) in [0, 1]."""

    def __init__(self, config, image_size, patch=8):
        super().__init__()
        self.config, self.patch = config, patch
        self.encoder = TextEncoder(config)
        sizes = config.width, config.encoder_layers, config.heads, config.mlp
        vit = VQGANConfig(image_size, patch, *sizes)
        self.image = Tower(vit, 3 * patch**2, config.width, *sizes)
        self.text = nn.Linear(config.width, config.width, bias=False)  # into the common space
        self.head = nn.Linear(config.width, config.text_vocab, bias=False)  # hidden tokens
        self.scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))  # log 1/temperature: CLIP
        initialise(self)

    def embed_text(self, text):
        """text (B, T) -> unit vectors (B, D) in float32: mean of the features of its tokens."""
        features, lengths = self.encoder(text)                          # (B, T, D)
        inside = torch.arange(text.shape[1], device=text.device) < lengths[:, None]  # (B, T)
        mean = (features * inside[..., None]).sum(1) / lengths[:, None]
        return F.normalize(linear_float32(mean, self.text.weight), dim=-1)

    def embed_images(self, images):
        """images (B, 3, S, S) in [0, 1] -> unit vectors (B, D) in float32."""
        features = self.image(patchify(images, self.patch))             # (B, N, D)
        return F.normalize(features.mean(1), dim=-1)

    def forward(self, text, images, hidden):
        """-> text vectors, image vectors, both (B, D), temperature factor (capped at 100), logits
        (B, T, V) of the masked-token objective for `hidden`, the text with hidden tokens."""
        features, _ = self.encoder(hidden)                              # (B, T, D)
        words = linear_float32(features, self.head.weight)              # (B, T, V)
        scale = self.scale.exp().clamp(max=100)
        return self.embed_text(text), self.embed_images(images), scale, words


def hide(text, vocab, draws):
    """BERT's corruption (Parti §2.3) of text (B, T) by uniform numbers draws (3, B, T): 15 % of the
    tokens are to be predicted; of these 80 % become MASK, 10 % a random piece, 10 % stay. Returns
    the text so corrupted and the chosen places (B, T)."""
    chosen = (draws[0] < 0.15) & (text != 0)
    piece = (4 + draws[2] * (vocab - 4)).long()  # the first four are padding, MASK, start and end
    hidden = torch.where(draws[1] < 0.8, MASK, torch.where(draws[1] < 0.9, piece, text))
    return torch.where(chosen, hidden, text), chosen


def contrastive_loss(text, images, scale):
    """Vectors (B, D) of pairs -> mean of the two cross-entropies (CLIP §2.3) over the global batch:
    every process sees all vectors, and gradients flow back through the gathering."""
    if dist.is_initialized():  # backward adds up W equal losses; DDP divides by W
        text, images = (all_gather_single_autograd(x, 0, dist.group.WORLD) for x in (text, images))
    logits = scale * linear_float32(text, images)                       # (B, B)
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


# --- optimiser -----------------------------------------------------------------------------------


class Adafactor(torch.optim.Optimizer):
    """Adafactor as Parti used it (§3): factored second moment with constant, bias-corrected decay,
    update clipping, momentum kept in int8, decoupled weight decay, absolute learning rate.

    m, the momentum, is stored as round(m / s) with one s = max|m| / 127 a column; that of vectors,
    which weigh nothing, as it is. Where Parti is silent: m has no bias correction, as in Praxis,
    and the learning rate multiplies m, as in Adam, not the update that enters it."""

    def __init__(self, params, lr, betas=(0.9, 0.96), weight_decay=0.045, clip=1.0):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, clip=clip))

    @torch.no_grad()
    def step(self, closure=None):  # torch passes one, None, when it loads a checkpoint
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad.float(), self.state[p], group)

    def update(self, p, grad, state, group):
        """One step of one parameter. No state yet: its averages start at their first value."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        t = state["step"] = state.get("step", 0) + 1
        fresh = (1 - beta2) / (1 - beta2**t)  # with beta2's bias correction

        def average(name, value):
            state[name] = state.get(name, value).lerp(value, fresh)
            return state[name]

        square = grad.square() + 1e-30
        if p.ndim >= 2:  # only the mean of each row and of each column is kept
            rows = average("rows", square.mean(-1, keepdim=True))
            columns = average("columns", square.mean(-2, keepdim=True))
            # Two roots: the product of two tiny means would be 0, and the update NaN.
            update = grad * ((rows / rows.mean(-2, keepdim=True)).rsqrt() * columns.rsqrt())
        else:
            update = grad * average("square", square).rsqrt()
        update = update / (update.square().mean().sqrt() / group["clip"]).clamp(min=1)
        # Loading a checkpoint makes all state float32 (torch): the same numbers, int8 again below.
        momentum = state.get("momentum", torch.zeros_like(update)) * state.get("bucket", 1)
        momentum = state["momentum"] = momentum.lerp(update, 1 - beta1)
        if p.ndim >= 2:
            state["bucket"] = (momentum.abs().amax(0, keepdim=True) / 127).clamp(min=1e-30)
            state["momentum"] = (momentum / state["bucket"]).round().to(torch.int8)
        p.mul_(1 - lr * group["weight_decay"]).add_(momentum, alpha=-lr)


# --- initial values ------------------------------------------------------------------------------


def initialise(model):
    """Every initial value of a prior or a dual encoder, but norms and biases, which keep torch's;
    the papers are silent on them."""
    for name, p in model.named_parameters():
        table = name.endswith(("embed.weight", "positions", "start", "rows", "columns"))
        if name == "head.weight":
            nn.init.zeros_(p)  # all equally likely, until `Parti.start_from`
        elif table and name != "image.embed.weight":  # that is a linear map
            nn.init.normal_(p)  # as loud as what attention adds, else words drown in early mixing
        elif p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)  # keeps the variance of unit-scale inputs
        # GPT-2: the sum over all residual branches keeps the variance. Cross-attention is left as
        # loud as it is: pictures must not outshout the text.
        if name.endswith(("attention.out.weight", "down.weight")):
            stack = model.encoder if name.startswith("encoder") else model
            p.data.mul_((2 * len(stack.blocks)) ** -0.5)


# --- which key a query sees ----------------------------------------------------------------------
# Plain arithmetic on purpose: the same lines run on Python integers, on torch tensors (masks) and,
# compiled by Triton, inside every kernel, so that no two can disagree.


def allowed(i, j, length, causal, kernel, grid):
    """Whether the query at position i sees the key at position j; integers or tensors, broadcast.

    Keys at `length` and after are padding, negative positions are empty slots. `causal`: j <= i.
    `kernel` > 0 (with `causal`): the conv-shaped mask of Parti §2.2 (DALL-E, Fig. 11), a causal
    kernel x kernel convolution over a raster of `grid` columns, with wraparound: i - j must be
    grid * r - c with 0 <= r <= kernel // 2 and |c| <= kernel // 2. A function of i - j alone, so
    the start token is no exception: it is position 0, and only i in the set of offsets see it.
    """
    visible = (j >= 0) & (j < length)
    if causal:
        visible = visible & (j <= i)
    if kernel > 0:
        half = kernel // 2
        shifted = i + half - j  # grid * r + (half - c), where half - c lies in 0 ... 2 * half
        visible = visible & (shifted <= (grid + 2) * half) & (shifted % grid <= 2 * half)
    return visible


def conv_offsets(kernel, grid):
    """The values of i - j that the conv-shaped mask allows, ascending: {0, 1, 3, 4, 5} for a 3 x 3
    kernel on a 4 x 4 grid, 61 values up to 165 for 11 x 11 on 32 x 32."""
    return [o for o in range(kernel * grid) if allowed(o, 0, 1, True, kernel, grid)]


# --- the hand-written path: flash attention in Triton --------------------------------------------
# With S = Q K^T / sqrt(d), masked, P = softmax(S) and O = P V, no N x N matrix is ever in memory:
# each program keeps one tile of rows and walks over the tiles of the other side. Exponentials are
# powers of 2 (what the hardware computes), hence S in units of log 2 wherever an exponent is taken.
# Tensors are contiguous, (B * H, n, D) of queries and (B * H, m, D) of keys; programs are numbered
# (tile, head). RULE is (causal, kernel, grid); a query sees keys at most `behind` positions before
# its own and `ahead` after it.

if triton is not None:
    _allowed = triton.jit(allowed)
    INTERPRET = constexpr(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1

    @triton.jit
    def _dot(a, b):
        """a @ b accumulated in float32; float32 inputs stay exact (no TF32)."""
        if INTERPRET:  # Triton's interpreter cannot multiply bfloat16
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, input_precision="ieee")

    @triton.jit
    def _program(LENGTHS, end, behind, ahead, OWN, STEP):
        """What this program works on: its head, the number of keys to see there, the positions of
        its own tile; and (first, last): the tiles of the other side, first, first + STEP, ... below
        last, cover what lies up to `behind` before its own and `ahead` after it, within `end`.

        With the sparse mask of grids up to 64 nothing else has to be skipped: a tile in between
        meets OWN + STEP - 1 values of i - j, more than the gap of grid - kernel between two rows.
        """
        head, start = tl.program_id(1).to(tl.int64), tl.program_id(0) * OWN
        length = tl.load(LENGTHS + head).to(tl.int32)
        first = max(start - behind, 0) // STEP * STEP
        return head, length, start + tl.arange(0, OWN), first, min(start + OWN + ahead, end)

    @triton.jit
    def _load(X, head, rows, n, D):
        """These of the n rows of a head, (rows, D); zeros beyond the last."""
        at = X + head * n * D + (rows[:, None] * D + tl.arange(0, D))
        return tl.load(at, rows[:, None] < n, other=0.0)

    @triton.jit
    def _store(X, head, rows, n, values, D):
        at = X + head * n * D + (rows[:, None] * D + tl.arange(0, D))
        tl.store(at, values, rows[:, None] < n)

    @triton.jit
    def _scores(x, y, i, j, length, RULE):
        """S = x y^T in units of log 2, -inf where `allowed` says no; x are queries and y keys, or
        the other way round."""
        s = _dot(x, tl.trans(y)) * (1.4426950408889634 * x.shape[1] ** -0.5)
        return tl.where(_allowed(i, j, length, RULE[0], RULE[1], RULE[2]), s, float("-inf"))

    @triton.jit
    def _forward(Q, K, V, OUT, LSE, LENGTHS, n, m, behind, ahead, RULE: constexpr,
                 D: constexpr, OWN: constexpr, STEP: constexpr):
        """O and the log-sum-exp of one tile of queries, over the keys that it sees."""
        head, length, i, first, last = _program(LENGTHS, m, behind, ahead, OWN, STEP)
        q = _load(Q, head, i, n, D)
        # Finite and positive floors: a row that sees no key ends with 0 / 1e-30.
        top = tl.full([OWN], -1e30, tl.float32)  # running maximum of S
        total = tl.full([OWN], 1e-30, tl.float32)  # running sum of exp(S - top)
        acc = tl.zeros([OWN, D], tl.float32)  # running sum of exp(S - top) V
        for j0 in range(first, min(last, length), STEP):
            j = j0 + tl.arange(0, STEP)
            k, v = _load(K, head, j, m, D), _load(V, head, j, m, D)
            s = _scores(q, k, i[:, None], j[None, :], length, RULE)
            new = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            shrink = tl.exp2(top - new)  # what was summed so far was relative to the old maximum
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v)
            top = new
        _store(LSE, head, i, n, (top + tl.log2(total))[:, None], 1)
        _store(OUT, head, i, n, acc / total[:, None], D)

    # Both backward kernels compute again P = exp(S - lse), then dP = dO V^T and
    # dS = P * (dP - delta), where delta = sum_j P dP, which is dO . O, for each row.

    @triton.jit
    def _backward_q(Q, K, V, GRAD, LSE, DELTA, LENGTHS, DQ, n, m, behind, ahead,
                    RULE: constexpr, D: constexpr, OWN: constexpr, STEP: constexpr):
        """dQ = dS K / sqrt(d) of one tile of queries, over the keys that it sees."""
        head, length, i, first, last = _program(LENGTHS, m, behind, ahead, OWN, STEP)
        q, grad = _load(Q, head, i, n, D), _load(GRAD, head, i, n, D)
        lse, delta = _load(LSE, head, i, n, 1), _load(DELTA, head, i, n, 1)  # (OWN, 1)
        dq = tl.zeros([OWN, D], tl.float32)
        for j0 in range(first, min(last, length), STEP):
            j = j0 + tl.arange(0, STEP)
            k, v = _load(K, head, j, m, D), _load(V, head, j, m, D)
            p = tl.exp2(_scores(q, k, i[:, None], j[None, :], length, RULE) - lse)
            ds = p * (_dot(grad, tl.trans(v)) - delta)
            dq += _dot(ds.to(k.dtype), k)
        _store(DQ, head, i, n, dq * D**-0.5, D)

    @triton.jit
    def _backward_kv(Q, K, V, GRAD, LSE, DELTA, LENGTHS, DK, DV, n, m, behind, ahead,
                     RULE: constexpr, D: constexpr, OWN: constexpr, STEP: constexpr):
        """dK = dS^T Q / sqrt(d) and dV = P^T dO of one tile of keys, over the queries that see it.
        S, P and dS are held transposed, keys by queries."""
        # Keys are seen from as far ahead as queries see behind.
        head, length, j, first, last = _program(LENGTHS, n, ahead, behind, OWN, STEP)
        k, v = _load(K, head, j, m, D), _load(V, head, j, m, D)
        dk, dv = tl.zeros([OWN, D], tl.float32), tl.zeros([OWN, D], tl.float32)
        for i0 in range(first, last, STEP):
            i = i0 + tl.arange(0, STEP)
            q, grad = _load(Q, head, i, n, D), _load(GRAD, head, i, n, D)
            lse, delta = _load(LSE, head, i, n, 1), _load(DELTA, head, i, n, 1)  # (STEP, 1)
            p = tl.exp2(_scores(k, q, i[None, :], j[:, None], length, RULE) - tl.trans(lse))
            ds = p * (_dot(v, tl.trans(grad)) - tl.trans(delta))
            dk += _dot(ds.to(q.dtype), q)
            dv += _dot(p.to(grad.dtype), grad)
        _store(DK, head, j, m, dk * D**-0.5, D)
        _store(DV, head, j, m, dv, D)


def launch(kernel, rows, own, step, rule, q, k, *tensors):
    """Run a kernel on every tile of `own` rows, in walks of `step` rows of the other side."""
    (heads, n, d), m, (causal, side, grid), size = q.shape, k.shape[1], rule, q.element_size()
    behind, ahead = (grid + 1) * (side // 2) if side else n, 0 if causal else m
    own, step = (own, step) if size == 2 else (32, 32)  # float32: smaller, to fit
    warps, stages = (8, 2) if d * size > 128 else (4, 3)  # wide rows fill the registers
    kernel[triton.cdiv(rows, own), heads](q, k, *tensors, n, m, behind, ahead, rule, d, own, step,
                                          num_warps=warps, num_stages=stages)


class Fused(torch.autograd.Function):
    """The kernels above as one differentiable function of contiguous q, k, v (B * H, n, d)."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, rule):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        own = 64 if rule[1] else 128  # a narrow tile follows the band of the mask more closely
        launch(_forward, q.shape[1], own, 64, rule, q, k, v, out, lse, lengths)
        ctx.save_for_backward(q, k, v, out, lse, lengths)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, lengths = ctx.saved_tensors
        grad = grad.contiguous()
        delta = (grad.float() * out).sum(-1)                            # (B * H, n)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        common = q, k, v, grad, lse, delta, lengths
        launch(_backward_q, q.shape[1], 64, 32, ctx.rule, *common, dq)
        launch(_backward_kv, k.shape[1], 64, 32, ctx.rule, *common, dk, dv)
        return dq, dk, dv, None, None


# --- the other path: torch's own attention -------------------------------------------------------


def by_blocks(q, k, v, kernel, grid, block=64):
    """The sparse mask with torch, without N x N work: each block of queries attends to the window
    of keys that it can reach."""
    n, out = q.shape[2], []
    i = torch.arange(n, device=q.device)
    for first in range(0, n, block):
        window = slice(max(first - (grid + 1) * (kernel // 2), 0), first + block)
        seen = allowed(i[first:first + block, None], i[window], n, True, kernel, grid)
        out.append(F.scaled_dot_product_attention(
            q[:, :, first:first + block], k[:, :, window], v[:, :, window], seen))
    return torch.cat(out, dim=2)


# --- the door ------------------------------------------------------------------------------------


def attention(q, k, v, causal=False, kernel=0, grid=0, lengths=None, fused=None):
    """softmax(Q K^T / sqrt(d), masked) V with statistics in float32, differentiable in q, k, v.

    q (B, H, Nq, d); k, v (B, H, Nk, d); any strides; returns (B, H, Nq, d) in q's dtype.
    causal: a query sees the keys at its own position and before it.
    kernel, grid: if kernel > 0 (odd), the conv-shaped sparse mask over a raster of `grid` columns,
      which is causal; see `allowed`.
    lengths: (B,) integers; keys at lengths[b] and after are padding and are not seen.
    fused: None takes the Triton kernels on a GPU (and on a CPU under TRITON_INTERPRET=1) for d of
      32, 64 or 128 and any type but float64, torch elsewhere; True or False insists.
    A query that sees no key gives zeros, and no gradient. Raises ValueError for a sparse mask
    whose kernel is even or that has no grid.
    """
    if kernel and (kernel % 2 == 0 or grid < 1):
        raise ValueError(f"a sparse mask needs an odd kernel and a grid, not {kernel} and {grid}")
    n, m, rule = q.shape[2], k.shape[2], (causal or kernel > 0, kernel, grid)
    if fused is None:
        fused = triton is not None and (q.is_cuda or INTERPRET.value)
        fused = fused and q.shape[-1] in (32, 64, 128) and q.dtype != torch.float64
    if not fused and lengths is None and not kernel:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if not fused and lengths is None and n == m:
        return by_blocks(q, k, v, kernel, grid)
    if lengths is None:
        lengths = torch.full(q.shape[:1], m, device=q.device)
    if fused:
        heads = (x.flatten(0, 1).contiguous() for x in (q, k, v))       # (B * H, n, d)
        lengths = lengths.clamp(max=m).repeat_interleave(q.shape[1])
        return Fused.apply(*heads, lengths, rule).view_as(q)
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(m, device=q.device)
    seen = allowed(i, j, lengths[:, None, None, None], *rule)
    return F.scaled_dot_product_attention(q, k, v, seen)  # torch, too, gives 0 for no key


# --- files and walk-through ----------------------------------------------------------------------


def restore(saved):
    """What `vqgan.read` gave of a checkpoint of train_prior.py -> Parti, or of its text stage
    DualEncoder, on the CPU and in eval mode."""
    config = PriorConfig(**saved["config"])
    if saved.get("stage") == "text":
        model = DualEncoder(config, saved["image_size"], saved["patch"])
    else:
        model = Parti(config)
    model.load_state_dict(saved["model"])
    return model.eval()


def load(path):
    """The same from the file. SystemExit, one line, if it is missing or damaged."""
    return restore(read(path))


def main():
    """Shapes and speed of a tiny example, and parameter counts against Parti's Table 1."""
    model, text = Parti(PRESETS["tiny"]).eval(), torch.randint(4, 300, (2, 9))
    start = time.perf_counter()
    tokens = model.generate(text, guidance=1.2)
    speed = tokens.numel() / (time.perf_counter() - start)
    words, logits = model.encoder(text)[0], model(text, tokens)
    print(f"tiny: text {tuple(text.shape)} -> encoded {tuple(words.shape)} -> sampled tokens "
          f"{tuple(tokens.shape)}, {speed:.0f} tokens/s; all logits {tuple(logits.shape)}")
    for name in ("350m", "750m", "3b", "20b"):
        with torch.device("meta"):  # no memory, no arithmetic
            model = Parti(PRESETS[name])
        blocks = sum(p.numel() for n, p in model.named_parameters() if "blocks" in n and p.ndim > 1)
        print(f"{name}: {blocks:,} parameters in the blocks, those that Table 1 counts")


if __name__ == "__main__":
    main()
