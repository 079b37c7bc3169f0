"""Make a Qwen2-VL of a few thousand random weights, with a tokenizer and an image processor, without a network.

Run ``python -m tests.sglang.checkpoint FOLDER PICTURE..`` in the environment of environment.py, which has transformers.
It prints the answer of the model about each picture, as computed by transformers alone. The weights are the same each
time. The answers of such a model mean nothing, but they depend on every pixel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["answers", "make", "PROMPT", "TOKENS"]

MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # Stands for an image in a prompt.
PROMPT = f"{IMAGE}What is this?"
TOKENS = 12  # Length of an answer.
PATCH, MERGE = 14, 2
POSITIONS = 2048
HIDDEN = 64


def make(folder: Path) -> None:
    """Write the checkpoint into `folder`, which must not exist yet."""
    import torch
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    folder.mkdir(parents=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        model_max_length=POSITIONS,
    )
    number = dict(zip(MARKS, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    pixels = {"min_pixels": 4 * (PATCH * MERGE) ** 2, "max_pixels": 64 * (PATCH * MERGE) ** 2}
    geometry = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**geometry, **pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**geometry),
        chat_template=f"{{% for message in messages %}}{IMAGE}{{{{ message['content'] }}}}{{% endfor %}}",
    ).save_pretrained(folder)

    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": POSITIONS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": number["<|endoftext|>"],
            "eos_token_id": number["<|im_end|>"],
            "pad_token_id": number["<|endoftext|>"],
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "in_chans": 3,  # The older name of in_channels, which SGLang reads.
        },
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # Larger than the initial weights, so that the image changes every answer.
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)


def answers(folder: Path, pictures: Iterable[Path]) -> list[str]:
    """Return the answer of the model about each picture, by transformers with greedy decoding."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    found = []
    for picture in pictures:
        inputs = processor(text=[PROMPT], images=[Image.open(picture)], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        answer = tokens[:, inputs["input_ids"].shape[1] :]
        found += processor.batch_decode(answer, skip_special_tokens=True)
    return found


def _tokenizer() -> object:
    """Return a tokenizer of the marks and each printable ASCII character, so that every answer is readable."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = ["\u0120", *map(chr, range(0x21, 0x7F))]  # A byte-level tokenizer spells a space as U+0120.
    tokenizer = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    return tokenizer


if __name__ == "__main__":
    target, *paths = map(Path, sys.argv[1:])
    make(target)
    print(json.dumps(answers(target, paths)))
