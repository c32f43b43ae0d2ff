# SPDX-License-Identifier: Apache-2.0
"""What the reference implementations make of the small random networks of foreign.py, into towers.json.

    pip install -e '.[parity]' && python tests/models/golden/make_towers.py

transformers has CLIP. The tests compare with the file, and where PyTorch is installed with a fresh run of this.
"""

import json

import foreign
import numpy as np
import torch
import transformers


def shapes_of(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items() if tensor.is_floating_point()}


def filled(module: torch.nn.Module) -> torch.nn.Module:
    tensors = {name: torch.from_numpy(array) for name, array in foreign.weights(shapes_of(module)).items()}
    missing = module.load_state_dict(tensors, strict=False).missing_keys
    assert all(name.endswith("num_batches_tracked") for name in missing), missing
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


PICTURES = ((32, 32), (120, 91), (91, 120), (480, 854), (224, 224))


def main() -> None:
    made = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, "clip": clip()}
    foreign.FILE.write_text(
        json.dumps(made, indent=None, separators=(",", ":"), ensure_ascii=True).replace('},"', '},\n"') + "\n"
    )
    print(foreign.FILE, foreign.FILE.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
