# SPDX-License-Identifier: Apache-2.0
"""What the reference implementations make of the small random networks of foreign.py, into towers.json.

    pip install -e '.[parity]' && python tests/models/golden/make_towers.py

transformers has CLIP, T5, UMT5 and VideoMAE. I3D and LPIPS are written here from their papers, with the names of the
published PyTorch modules. The tests compare with the file, and where PyTorch is installed with a fresh run of this.
"""

import itertools
import json
import math

import foreign
import numpy as np
import torch
import transformers

AGAIN = "encoder.embed_tokens.weight"  # another name of T5's shared.weight


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    tensors = module.state_dict()
    return {name: list(t.shape) for name, t in tensors.items() if t.is_floating_point() and name != AGAIN}


def filled(module: torch.nn.Module) -> torch.nn.Module:
    tensors = {name: torch.from_numpy(array) for name, array in foreign.weights(shapes_of(module)).items()}
    missing = module.load_state_dict(tensors, strict=False).missing_keys
    assert all(name.endswith(("num_batches_tracked", AGAIN)) for name in missing), missing
    return module.eval()


def clip() -> dict:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = filled(transformers.CLIPModel(transformers.CLIPConfig(**foreign.CLIP)))
    vocabulary, merges = foreign.byte_pairs()
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    read = tokenizer(list(foreign.CAPTIONS), padding="max_length", truncation=True, max_length=19, return_tensors="pt")
    whole = tokenizer(list(foreign.CAPTIONS))["input_ids"]
    images = torch.from_numpy(foreign.inputs("images", (3, 15, 15, 3))).permute(0, 3, 1, 2)
    with torch.no_grad():
        text = model.text_model(read.input_ids, output_hidden_states=True)
        masked = model.text_model(read.input_ids, attention_mask=read.attention_mask)
        image = model.vision_model(images, output_hidden_states=True)
        outputs = {
            "text_embedding": model.text_projection(text.pooler_output),
            "text_hidden": text.last_hidden_state,
            "text_layer_2": text.hidden_states[2],
            "text_hidden_masked": masked.last_hidden_state,
            "image_embedding": model.visual_projection(image.pooler_output),
            "image_hidden": image.last_hidden_state,
            "image_layer_0": image.hidden_states[0],
            "logits": model(input_ids=read.input_ids, pixel_values=images).logits_per_text,
        }
    processor = CLIPImageProcessorPil()
    pictures = {f"{h}x{w}": processor(foreign.picture(h, w))["pixel_values"][0].transpose(1, 2, 0) for h, w in PICTURES}
    return {
        "shapes": shapes_of(model),
        "tokens": read.input_ids.tolist(),
        "mask": read.attention_mask.tolist(),
        "whole": whole,
        "outputs": {name: foreign.shown(tensor.numpy()) for name, tensor in outputs.items()},
        "prepared": {name: foreign.shown(np.asarray(array)) for name, array in pictures.items()},
    }


T5_CLASSES = {
    "umt5": (transformers.UMT5EncoderModel, transformers.UMT5Config),
    "t5": (transformers.T5EncoderModel, transformers.T5Config),
    "t5_first": (transformers.T5EncoderModel, transformers.T5Config),
}
T5_PUBLISHED = {  # config.json of the hub, as far as it tells sizes
    "google/umt5-xxl": ("umt5", dict(vocab_size=256384, d_model=4096, d_ff=10240, num_layers=24, num_heads=64)),
    "google/t5-v1_1-xxl": ("t5", dict(vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64)),
}


def t5(kind: str) -> dict:
    """Outputs, what each layer gives, and gradients for the words that go in and the table of distances."""
    model_class, config_class = T5_CLASSES[kind]
    config = config_class(**{name: value for name, value in foreign.T5_KINDS[kind].items() if name != "model_type"})
    model = filled(model_class(config))
    tokens, mask = (torch.from_numpy(array) for array in foreign.t5_inputs())
    probe = torch.from_numpy(foreign.inputs("probe", (*mask.shape, config.d_model)))
    layers: list[torch.Tensor] = []
    for block in model.encoder.block:
        block.register_forward_hook(
            lambda module, given, made: layers.append(made[0] if isinstance(made, tuple) else made)
        )
    hidden = model(tokens, attention_mask=mask).last_hidden_state
    (hidden * mask[..., None] * probe).sum().backward()
    outputs = {
        "hidden": hidden,
        **{f"layer_{i + 1}": x for i, x in enumerate(layers)},
        "gradient_words": model.shared.weight.grad,
        "gradient_distances": model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad,
    }
    with torch.no_grad():
        outputs["hidden_unmasked"] = model(tokens).last_hidden_state
    return {
        "shapes": shapes_of(model),
        "outputs": {name: foreign.shown(tensor.detach().numpy()) for name, tensor in outputs.items()},
    }


def t5_published(name: str) -> dict:
    """All names and shapes of the real sizes, built without memory; the layers behind the second are like it."""
    kind, config = T5_PUBLISHED[name]
    model_class, config_class = T5_CLASSES[kind]
    with torch.device("meta"):
        shapes = shapes_of(model_class(config_class(**config, d_kv=64, feed_forward_proj="gated-gelu")))
    return {
        "config": config | dict(model_type=kind, d_kv=64, feed_forward_proj="gated-gelu"),
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "num_tensors": len(shapes),
        "shapes": {name: shape for name, shape in shapes.items() if ".block." not in name or ".block.0." in name},
        "of_every_layer": {name: shape for name, shape in shapes.items() if ".block.1." in name},
    }


def t5_buckets() -> dict:
    """Of each table size the rows for keys from 600 tokens before the query to 600 behind it."""
    from transformers.models.t5.modeling_t5 import T5Attention

    away = torch.arange(-600, 601)
    sizes = ((32, 128), (12, 20), (64, 300))
    row = T5Attention._relative_position_bucket
    return {f"{n},{far}": _runs(row(away, num_buckets=n, max_distance=far).tolist()) for n, far in sizes}


def _runs(numbers: list[int]) -> list[list[int]]:
    """[number, how often] of each run of equal ones."""
    return [[number, len(list(group))] for number, group in itertools.groupby(numbers)]


def t5_tokenizer() -> dict:
    tokenizer = transformers.T5Tokenizer(vocab=foreign.pieces(), extra_ids=2)
    captions = list(foreign.CAPTIONS)
    read = tokenizer(captions, padding="max_length", truncation=True, max_length=16)
    return {
        "tokens": read["input_ids"],
        "mask": read["attention_mask"],
        "whole": tokenizer(captions)["input_ids"],
        "file": json.loads(tokenizer.backend_tokenizer.to_str()),
    }


def videomae() -> dict:
    videos = foreign.inputs("videos", (2, 4, 15, 15, 3))
    with torch.no_grad():
        pixels = torch.from_numpy(videos).permute(0, 1, 4, 2, 3)
        tuned = filled(
            transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**foreign.VIDEOMAE, num_labels=5))
        )
        hidden = tuned.videomae(pixels).last_hidden_state
        config = transformers.VideoMAEConfig(**foreign.VIDEOMAE, use_mean_pooling=False)
        plain = filled(transformers.VideoMAEModel(config))
        outputs = {
            "hidden": hidden,
            "features": tuned.fc_norm(hidden.mean(1)),
            "hidden_norm_first": plain(pixels).last_hidden_state,
        }
    bytes_ = torch.from_numpy(np.stack([foreign.picture(20, 31)] * 2)[None])  # (1, 2, 20, 31, 3)
    stretched = torch.nn.functional.interpolate(
        bytes_[0].permute(0, 3, 1, 2).float() / 255, size=(24, 24), mode="bilinear", align_corners=False
    )
    return {
        "shapes": shapes_of(tuned),
        "shapes_norm_first": shapes_of(plain),
        "outputs": {name: foreign.shown(tensor.numpy()) for name, tensor in outputs.items()},
        "prepared": foreign.shown(stretched.permute(0, 2, 3, 1).numpy()[None]),
    }


def same(x: torch.Tensor, window: tuple, stride: tuple) -> torch.Tensor:
    """Zeros around (B, C, T, H, W), so that ceil(size / stride) windows fit: the lesser half in front."""
    around = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(window), reversed(stride), strict=True):
        missing = max((math.ceil(size / s) - 1) * s + k - size, 0)
        around += [missing // 2, missing - missing // 2]
    return torch.nn.functional.pad(x, around)


class Unit(torch.nn.Module):
    """Convolution, batch norm, relu; the names inside are those of the published port."""

    def __init__(self, wide_in: int, wide: int, kernel: tuple = (1, 1, 1), stride: tuple = (1, 1, 1)) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = torch.nn.Conv3d(wide_in, wide, kernel, stride, bias=False)
        self.bn = torch.nn.BatchNorm3d(wide, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv3d(same(x, self.kernel, self.stride))).relu()


class Inception(torch.nn.Module):
    def __init__(self, wide_in: int, w: tuple) -> None:
        super().__init__()
        self.b0 = Unit(wide_in, w[0])
        self.b1a, self.b1b = Unit(wide_in, w[1]), Unit(w[1], w[2], (3, 3, 3))
        self.b2a, self.b2b = Unit(wide_in, w[3]), Unit(w[3], w[4], (3, 3, 3))
        self.b3b = Unit(wide_in, w[5])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


def pool(x: torch.Tensor, window: tuple, stride: tuple) -> torch.Tensor:
    return torch.nn.functional.max_pool3d(same(x, window, stride), window, stride)


class InceptionI3d(torch.nn.Module):
    def __init__(self, num_classes: int, stem: tuple, blocks: tuple, last_pool: tuple) -> None:
        super().__init__()
        self.last_pool, self.names = last_pool, [name for name, _ in blocks]
        self.Conv3d_1a_7x7 = Unit(3, stem[0], (7, 7, 7), (2, 2, 2))
        self.Conv3d_2b_1x1 = Unit(stem[0], stem[1])
        self.Conv3d_2c_3x3 = Unit(stem[1], stem[2], (3, 3, 3))
        wide = stem[2]
        for name, w in blocks:
            setattr(self, name, Inception(wide, w))
            wide = w[0] + w[2] + w[4] + w[5]
        self.logits = torch.nn.Module()
        self.logits.conv3d = torch.nn.Conv3d(wide, num_classes, (1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in self.names:
            if name == "Mixed_4b":
                x = pool(x, (3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                x = pool(x, (2, 2, 2), (2, 2, 2))
            x = getattr(self, name)(x)
        x = torch.nn.functional.avg_pool3d(x, self.last_pool, (1, 1, 1))
        return self.logits.conv3d(x).flatten(2).mean(2)


def i3d() -> dict:
    model = filled(InceptionI3d(**foreign.I3D))
    # Odd and even sizes, so that the padding of each kind of layer is uneven somewhere.
    videos = torch.from_numpy(foreign.inputs("videos", (2, 13, 50, 67, 3)))
    with torch.no_grad():
        logits = model(videos.permute(0, 4, 1, 2, 3))
    return {"shapes": shapes_of(model), "outputs": {"logits": foreign.shown(logits.numpy())}}


def lpips(trunk: str) -> dict:
    """torchvision's layers by their numbers, and the heads of the published package."""
    modules, heads = {}, []
    wide_in = 3
    for step in foreign.LPIPS_TRUNKS[trunk]:
        if isinstance(step, tuple):
            number, wide, kernel, stride, padding = step
            modules[str(number)] = torch.nn.Conv2d(wide_in, wide, kernel, stride, padding)
            wide_in = wide
        elif step == "tap":
            heads.append(wide_in)
    net = torch.nn.Module()
    net.features = torch.nn.ModuleDict(modules)
    for i, wide in enumerate(heads):
        lin = torch.nn.Module()
        lin.model = torch.nn.ModuleList([torch.nn.Dropout(), torch.nn.Conv2d(wide, 1, 1, bias=False)])
        setattr(net, f"lin{i}", lin)
    filled(net)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (torch.from_numpy(foreign.inputs(name, (3, 41, 37, 3)) * 0.5) for name in ("x", "y"))
    with torch.no_grad():
        pair = [((image - shift) / scale).permute(0, 3, 1, 2) for image in (x, y)]
        total, number = torch.zeros(3), 0
        for step in foreign.LPIPS_TRUNKS[trunk]:
            if step == "pool":
                window = 3 if trunk == "alex" else 2
                pair = [torch.nn.functional.max_pool2d(image, window, 2) for image in pair]
            elif step == "tap":
                one, other = (image / (image.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for image in pair)
                total += getattr(net, f"lin{number}").model[1]((one - other).pow(2)).mean((1, 2, 3))
                number += 1
            else:
                pair = [net.features[str(step[0])](image).relu() for image in pair]
    return {"shapes": shapes_of(net), "outputs": {"distance": foreign.shown(total.numpy())}}


PICTURES = ((32, 32), (120, 91), (91, 120), (480, 854), (224, 224))


def main() -> None:
    made = {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "clip": clip(),
        "t5": {kind: t5(kind) for kind in foreign.T5_KINDS},
        "t5_published": {name: t5_published(name) for name in T5_PUBLISHED},
        "t5_buckets": t5_buckets(),
        "t5_tokenizer": t5_tokenizer(),
        "videomae": videomae(),
        "i3d": i3d(),
        "lpips": {trunk: lpips(trunk) for trunk in foreign.LPIPS_TRUNKS},
    }
    foreign.FILE.write_text(
        json.dumps(made, indent=None, separators=(",", ":"), ensure_ascii=True).replace('},"', '},\n"') + "\n"
    )
    print(foreign.FILE, foreign.FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
