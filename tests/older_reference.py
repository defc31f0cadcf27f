# SPDX-License-Identifier: Apache-2.0
"""The forward of older checkpoints, slow and in float64, from their tensors and their config alone.

Every step is written out in plain operations on one row without padding, after the papers and the notes on the older
code; the vision tower alone is run by transformers. Nothing of this package is used.

The choices where the older code is not followed are those of the package: the second expert is the second most probable
one (it was sampled), nothing is dropped for lack of capacity, and MiniCPM's text embeddings are scaled whether there is
a picture or not.
"""

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel


IMAGE = -200


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight + bias


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def rotate(x: torch.Tensor, dimensions: int, base: float, scale: float = 1.0) -> torch.Tensor:
    """Turns the first `dimensions` of every head: number i with number i + dimensions / 2.

    x is (heads, T, head_dim).
    """
    half = dimensions // 2
    frequencies = torch.tensor([base ** (-2 * i / dimensions) for i in range(half)], dtype=torch.float64)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] / scale * frequencies  # (T, half)
    first, second, rest = x[..., :half], x[..., half:dimensions], x[..., dimensions:]
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin(), rest]
    return torch.cat(turned, dim=-1)


class Reference:
    """A checkpoint, ready to be asked.

    Args:
        state: its tensors, by their older names.
        config: its config.json.
        tower_folder: where the tower's config is, and its weights where the checkpoint has none.
        projector_prefix: what comes before the projector's own keys.
        tower_prefix: what comes before `vision_model.`.
    """

    def __init__(
        self,
        state: dict[str, torch.Tensor],
        config: dict[str, Any],
        tower_folder: Path,
        projector_prefix: str,
        tower_prefix: str,
    ):
        self.state = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
        self.config = config
        self.tower_folder = tower_folder
        self.projector_prefix, self.tower_prefix = projector_prefix, tower_prefix
        self.family = config["model_type"].removeprefix("moe_").removeprefix("llava_")
        if self.family == "llava":  # LLaVA-1.5
            self.family = "llama"
        self.aux: list[float] = []
        self.chosen: set[int] = set()

    # -- small things ---------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.state[name]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        out = x @ self[f"{name}.weight"].T
        return out + self[f"{name}.bias"] if f"{name}.bias" in self.state else out

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.family == "phi":
            return layer_norm(x, self[f"{name}.weight"], self[f"{name}.bias"], self.config["layer_norm_eps"])
        if self.family == "stablelm":
            return layer_norm(x, self[f"{name}.weight"], self[f"{name}.bias"], self.config["norm_eps"])
        eps = self.config["layer_norm_epsilon" if self.family == "qwen" else "rms_norm_eps"]
        return rms_norm(x, self[f"{name}.weight"], eps)

    # -- pictures -------------------------------------------------------------------------------------------------

    def picture_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, height, width) -> (pictures, tokens, hidden size)."""
        config = AutoConfig.from_pretrained(self.tower_folder)
        tower_class = CLIPVisionModel if config.model_type == "clip" else SiglipVisionModel
        config.vision_config._attn_implementation = "eager"
        tower = tower_class(config.vision_config).double().eval()
        prefix = f"{self.tower_prefix}vision_model."
        own = {name.removeprefix(prefix): t for name, t in self.state.items() if name.startswith(prefix)}
        if not own:
            tensors = load_file(self.tower_folder / "model.safetensors")
            own = {n.removeprefix("vision_model."): t for n, t in tensors.items() if n.startswith("vision_model.")}
        own.pop("embeddings.position_ids", None)
        expected = {name.removeprefix("vision_model."): name for name in tower.state_dict()}
        if own.keys() != expected.keys():
            raise ValueError(f"the tower has other keys than the checkpoint: {own.keys() ^ expected.keys()}")
        tower.load_state_dict({expected[name]: tensor for name, tensor in own.items()})
        with torch.no_grad():
            hidden_states = tower(pixel_values.double(), output_hidden_states=True).hidden_states
        features = hidden_states[self.config["mm_vision_select_layer"]]
        if self.config["mm_vision_select_feature"] == "patch":
            features = features[:, 1:]  # SigLIP too, where it is no class token but the first patch
        return self.projected(features)

    def projected(self, x: torch.Tensor) -> torch.Tensor:
        kind = self.config.get("image_projector_type") or self.config["mm_projector_type"]
        name = self.projector_prefix
        if kind == "linear":
            return self.linear(x, name)
        if kind.startswith("qformer"):
            x = self.linear(gelu(self.linear(x, f"{name}.proj_in.0")), f"{name}.proj_in.2")
            x = torch.stack([self.queried(one) for one in x])
            return self.linear(gelu(self.linear(x, f"{name}.proj_out.0")), f"{name}.proj_out.2")
        if kind.startswith("pool_"):
            side = math.isqrt(x.shape[1])
            grid = x.unflatten(1, (side, side))  # (pictures, rows, columns, width)
            even = side // 2 * 2
            grid = grid[:, :even, :even]
            x = (grid[:, 0::2, 0::2] + grid[:, 0::2, 1::2] + grid[:, 1::2, 0::2] + grid[:, 1::2, 1::2]) / 4
            x = x.flatten(1, 2)
            kind, name = kind.removeprefix("pool_"), f"{name}.block"
        depth = int(kind.removeprefix("mlp").removesuffix("x_gelu"))
        x = self.linear(x, f"{name}.0")
        for index in range(1, depth):
            x = self.linear(gelu(x), f"{name}.{2 * index}")
        return x

    def queried(self, features: torch.Tensor) -> torch.Tensor:
        """BLIP-2's Q-Former over the features of one picture: (tokens, width) -> (queries, width)."""
        name = f"{self.projector_prefix}.qformer"

        def normed(x: torch.Tensor, norm: str) -> torch.Tensor:
            return layer_norm(x, self[f"{norm}.weight"], self[f"{norm}.bias"], 1e-12)

        def attended(x: torch.Tensor, to: torch.Tensor, attention: str, heads: int = 32) -> torch.Tensor:
            q = self.linear(x, f"{attention}.attention.query").unflatten(-1, (heads, -1)).transpose(0, 1)
            k = self.linear(to, f"{attention}.attention.key").unflatten(-1, (heads, -1)).transpose(0, 1)
            v = self.linear(to, f"{attention}.attention.value").unflatten(-1, (heads, -1)).transpose(0, 1)
            weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
            mixed = (weights @ v).transpose(0, 1).flatten(1)
            return normed(self.linear(mixed, f"{attention}.output.dense") + x, f"{attention}.output.LayerNorm")

        x = normed(self[f"{self.projector_prefix}.query_tokens"][0], f"{name}.layernorm")
        layer = 0
        while f"{name}.encoder.layer.{layer}.output_query.dense.weight" in self.state:
            inner = f"{name}.encoder.layer.{layer}"
            x = attended(x, x, f"{inner}.attention")
            x = attended(x, features, f"{inner}.crossattention")
            wide = gelu(self.linear(x, f"{inner}.intermediate_query.dense"))
            x = normed(self.linear(wide, f"{inner}.output_query.dense") + x, f"{inner}.output_query.LayerNorm")
            layer += 1
        return x

    # -- the language model ---------------------------------------------------------------------------------------

    def embedded(self, ids: list[int], features: torch.Tensor | None) -> torch.Tensor:
        """Text embeddings with the pictures' features in the places of `IMAGE`: (T, hidden size)."""
        table = self["transformer.wte.weight" if self.family == "qwen" else "model.embed_tokens.weight"]
        scale = self.config["scale_emb"] if self.family == "minicpm" else 1.0
        pieces, picture = [], 0
        for token in ids:
            if token == IMAGE:
                pieces.append(features[picture])
                picture += 1
            else:
                pieces.append(table[token][None] * scale)
        return torch.cat(pieces)

    def attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        config, length = self.config, x.shape[0]
        heads = config["num_attention_heads"]
        head_dim = config["hidden_size"] // heads
        if self.family == "qwen":
            name = f"transformer.h.{layer}.attn"
            q, k, v = self.linear(x, f"{name}.c_attn").split(config["hidden_size"], dim=-1)
            output, key_heads = f"{name}.c_proj", heads
            rotary, base = head_dim, config["rotary_emb_base"]
        else:
            name = f"model.layers.{layer}.self_attn"
            q, k, v = (self.linear(x, f"{name}.{part}_proj") for part in "qkv")
            output = f"{name}.dense" if self.family == "phi" else f"{name}.o_proj"
            key_heads = config["num_key_value_heads"]
            share = {"phi": "partial_rotary_factor", "stablelm": "rope_pct"}.get(self.family)
            rotary = head_dim if share is None else int(head_dim * config[share])
            base = config.get("rope_theta", 10000.0)
        scaling = config.get("rope_scaling")
        scale = scaling["factor"] if scaling else 1.0  # linear interpolation of positions
        q = rotate(q.unflatten(-1, (heads, head_dim)).transpose(0, 1), rotary, base, scale)
        k = rotate(k.unflatten(-1, (key_heads, head_dim)).transpose(0, 1), rotary, base, scale)
        v = v.unflatten(-1, (key_heads, head_dim)).transpose(0, 1)
        window = config.get("sliding_window") if self.family == "mistral" else None
        rows = []
        for head in range(heads):
            of_key = head // (heads // key_heads)
            scores = q[head] @ k[of_key].T / math.sqrt(head_dim)
            for i in range(length):
                scores[i, i + 1 :] = -math.inf
                if window is not None:
                    scores[i, : max(i - window + 1, 0)] = -math.inf
            rows.append(torch.softmax(scores, dim=-1) @ v[of_key])
        return self.linear(torch.cat(rows, dim=-1), output)

    def expert(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.family == "phi":
            return self.linear(gelu_new(self.linear(x, f"{name}.fc1")), f"{name}.fc2")
        if self.family == "qwen":
            return self.linear(self.linear(x, f"{name}.w1") * silu(self.linear(x, f"{name}.w2")), f"{name}.c_proj")
        gate, up = self.linear(x, f"{name}.gate_proj"), self.linear(x, f"{name}.up_proj")
        return self.linear(silu(gate) * up, f"{name}.down_proj")

    def ffn(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gate = f"{name}.deepspeed_moe.gate.wg"
        if f"{gate}.weight" not in self.state:
            return self.expert(x, name)
        k = self.config["moe"]["top_k_experts"]
        probabilities = torch.softmax(self.linear(x, gate), dim=-1)  # over all experts, before the choice
        rows = []
        for token, p in zip(x, probabilities, strict=True):
            chosen = sorted(range(len(p)), key=lambda e, p=p: -float(p[e]))[:k]
            self.chosen.update(chosen)
            total = 1.0 if k == 1 else sum(p[e] for e in chosen)  # one expert keeps its raw probability
            outputs = [
                p[e] / total * self.expert(token[None], f"{name}.deepspeed_moe.experts.deepspeed_experts.{e}")[0]
                for e in chosen
            ]
            rows.append(sum(outputs))
        out = torch.stack(rows)
        first = F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).double()
        self.aux.append(float(probabilities.shape[-1] * (probabilities.mean(0) * first.mean(0)).sum()))
        if self.config["moe"].get("use_residual"):
            c = torch.softmax(self.linear(x, f"{name}.coefficient"), dim=-1)
            out = c[:, :1] * out + c[:, 1:] * self.expert(x, f"{name}.mlp")
        if any(key.startswith(f"{name}.meta_moe.") for key in self.state):
            out = out + self.expert(x, f"{name}.meta_moe")
        return out

    def layer(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if self.family == "qwen":
            name = f"transformer.h.{index}"
            x = x + self.attention(self.norm(x, f"{name}.ln_1"), index)
            return x + self.ffn(self.norm(x, f"{name}.ln_2"), f"{name}.mlp")
        name = f"model.layers.{index}"
        if self.family == "phi":
            normed = self.norm(x, f"{name}.input_layernorm")
            return x + self.attention(normed, index) + self.ffn(normed, f"{name}.mlp")
        scale = 1.0
        if self.family == "minicpm":
            scale = self.config["scale_depth"] / math.sqrt(self.config["num_hidden_layers"])
        x = x + scale * self.attention(self.norm(x, f"{name}.input_layernorm"), index)
        return x + scale * self.ffn(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")

    @torch.no_grad()
    def logits(self, ids: list[int], pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of one row, (T, vocabulary), in which every `IMAGE` has become its picture's tokens.

        `self.aux` then holds the load-balancing loss of every sparse layer, before its coefficient, and `self.chosen`
        the experts that any token went to.
        """
        self.aux, self.chosen = [], set()
        x = self.embedded(ids, None if pixel_values is None else self.picture_features(pixel_values))
        for index in range(self.config["num_hidden_layers"]):
            x = self.layer(x, index)
        final = {"qwen": "transformer.ln_f", "phi": "model.final_layernorm"}.get(self.family, "model.norm")
        x = self.norm(x, final)
        if self.family == "minicpm":
            x = x / (self.config["hidden_size"] / self.config["dim_model_base"])
        head = self.state.get("lm_head.weight")
        return x @ (self["model.embed_tokens.weight"] if head is None else head).T


# ---------------------------------------------------------------------------------------------------------------------
# Before the model: pictures and text
# ---------------------------------------------------------------------------------------------------------------------


def expand2square(picture: Image.Image, image_mean: list[float]) -> Image.Image:
    """A square of the mean colour with the picture in its middle, if it is no square itself."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in image_mean))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def tokens_of(prompt: str, tokenizer) -> list[int]:
    """The ids of a prompt, `IMAGE` for every `<image>`: its pieces are tokenised one by one."""
    pieces = [tokenizer(piece).input_ids for piece in prompt.split("<image>")]
    bos = tokenizer.bos_token_id
    ids = list(pieces[0])
    starts_with_bos = bool(ids) and bos is not None and ids[0] == bos
    for piece in pieces[1:]:
        ids.append(IMAGE)
        ids += piece[1:] if starts_with_bos else piece
    return ids
