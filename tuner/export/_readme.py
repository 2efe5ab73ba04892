"""README.md of an export: how a program loads each format without tuner."""

import json
from collections.abc import Mapping
from typing import Any

TAGGING = "token_classification"
AUTO_CLASSES = {
    "text_generation": "AutoModelForCausalLM",
    TAGGING: "AutoModelForTokenClassification",
}
"""transformers' class by task; of other tasks the one for whole texts."""
OBJECT_TASKS = ("detection", "instance_segmentation")
ONNX_FORMATS = ("onnx", "onnx_fp16", "onnx_int8")
OPENING = """# {title}

{meaning}. What the model is, how it was made and how well it does is in [MODEL_CARD.md](MODEL_CARD.md); `manifest.json` has all of it for programs. `tuner predict` and `tuner.load` read this folder as it is. Nothing below needs tuner; run it in this folder, with {input} in the place of `{placeholder}`.
"""
OPEN_IMAGE = 'ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")'
"""An image as it is seen, whatever way the camera was held."""
READ_IMAGES = {
    "crop": """image = {open}
image = image.resize([max({shorter}, int(side * ({shorter} / min(image.size)))) for side in image.size], Image.Resampling.{filter})
left, top = [round((side - {size}) / 2) for side in image.size]
image = image.crop((left, top, left + {size}, top + {size}))
""",
    "letterbox": """photo = {open}
photo = photo.resize([max(1, round(side * ({size} / max(photo.size)))) for side in photo.size], Image.Resampling.{filter})
image = Image.new("RGB", ({size}, {size}), (114, 114, 114))
image.paste(photo, (({size} - photo.width) // 2, ({size} - photo.height) // 2))
""",
    "stretch": "image = {open}.resize(({size}, {size}), Image.Resampling.{filter})\n",
}
"""The lines that make `image`, of the model's size, by `fit`. core/geometry.py says the same."""
PIXELS = "np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255"
READ_TEXT = """tokenizer = Tokenizer.from_file("tokenizer/tokenizer.json")
tokenizer.enable_truncation({length})
tokenizer.no_padding()
text = tokenizer.encode("some text")
"""
TEXT_FIELDS = {
    "input_ids": "text.ids",
    "attention_mask": "text.attention_mask",
    "token_type_ids": "text.type_ids",
}
"""What a text of `tokenizers` calls each input of a model."""


def format_readme(m: Mapping[str, Any]) -> str:
    """The README of an export, from its manifest."""
    run = m["run"]
    is_text = m["preprocess"]["kind"] == "tokens"
    parts = [
        OPENING.format(
            title=f"{run['model']['name']} for {run['task']['name'].replace('_', ' ')}",
            meaning=f"Output: {m['output']['meaning']}",
            input="a text" if is_text else "an image of yours",
            placeholder="some text" if is_text else "image.jpg",
        )
    ]
    for name, entry in m["exports"].items():
        if name == "pretrained":
            program = transformers_program(m) if is_text else timm_program(m)
        elif name in PROGRAMS:
            program = numpy_program(m, entry["file"], *PROGRAMS[name])
        else:
            continue
        parts.append(f"## {name}\n\n```python\n{program}```\n")
    return "\n".join(parts)


def read_example(preprocess: Mapping[str, Any]) -> str:
    """The lines that make `image`, which the model takes, or `text`, which has its inputs."""
    if preprocess["kind"] == "tokens":
        return READ_TEXT.format(length=preprocess["length"])
    return READ_IMAGES[preprocess["fit"]].format(
        open=OPEN_IMAGE,
        size=preprocess["size"],
        shorter=preprocess["resize"],
        filter=preprocess["interpolation"].upper(),
    )


def text_inputs(preprocess: Mapping[str, Any], array: str) -> str:
    """A text's inputs by name; `array` makes one of a list of numbers."""
    inputs = (f'"{name}": {array}([{TEXT_FIELDS[name]}])' for name in preprocess["leaves"])
    return f"{{{', '.join(inputs)}}}"


def numpy_program(
    m: Mapping[str, Any], file: str, library: str, only_output: str, all_outputs: str
) -> str:
    """A program whose model takes and gives arrays.

    The two expressions call the model, with `{file}` in the place of its file, `{names}` of the
    outputs' names, and `{named}` and `{tensors}` of the inputs, as a dict of arrays and as torch
    takes them.

    Args:
        m: The manifest.
        file: The model's file.
        library: What the program imports.
        only_output: An expression for the array of a model that has one output.
        all_outputs: An expression for the arrays of a model that has several.
    """
    preprocess, names = m["preprocess"], m["output_names"]
    is_text = preprocess["kind"] == "tokens"
    reading = "from tokenizers import Tokenizer" if is_text else "from PIL import Image, ImageOps"
    call = (only_output if len(names) == 1 else all_outputs).format(
        file=file,
        names=json.dumps(names),
        named=text_inputs(preprocess, "np.array") if is_text else '{"image": x}',
        tensors=text_inputs(preprocess, "torch.tensor") if is_text else "torch.from_numpy(x)",
    )
    pixels = "" if is_text else f"x = {PIXELS}\n"
    if library == "torch" and m["run"]["task"]["name"] in OBJECT_TASKS:
        library = "torch, torchvision  # which has the operator nms"
    return (
        f"import numpy as np\nimport {library}\n{reading}\n\n{read_example(preprocess)}{pixels}"
        f"{', '.join(names)} = {call}\n{format_answer(m)}"
    )


ONNX_CALL = 'onnxruntime.InferenceSession("{file}").run({names}, {named})'
OPENVINO_CALL = (
    'openvino.compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})({named})'
)
TORCH_CALL = 'torch.export.load("{file}").module()({tensors})'
PROGRAMS = {
    **dict.fromkeys(ONNX_FORMATS, ("onnxruntime", f"{ONNX_CALL}[0]", ONNX_CALL)),
    "openvino": ("openvino", f"{OPENVINO_CALL}[0]", f"{OPENVINO_CALL}.to_tuple()"),
    "torch_export": (
        "torch",
        f"{TORCH_CALL}.numpy(force=True)",
        f"[value.numpy(force=True) for value in {TORCH_CALL}.values()]",
    ),
}


def format_answer(m: Mapping[str, Any]) -> str:
    """The line that prints what the model's outputs say."""
    names, task = list(m["classes"]), m["run"]["task"]["name"]
    shapes = f"[values.shape for values in ({', '.join(m['output_names'])},)]"
    if task in OBJECT_TASKS:
        told = (
            f"[({names!r}[int(label)], float(score), box.tolist()) "
            "for label, score, box in zip(labels[0], scores[0], boxes[0]) if score > 0.5]"
        )
    elif task == "text_generation":
        told = "tokenizer.decode([int(output[0, -1].argmax())])"
    elif not names:
        told = shapes
    elif task == TAGGING:
        told = f"[{names!r}[int(tag)] for tag in output[0].argmax(-1)]"
    elif task.endswith("classification"):
        likeliest = "np.exp(output[0].max() - np.logaddexp.reduce(output[0]))"
        told = f"{names!r}[int(output[0].argmax())], round(float({likeliest}), 4)"
    elif task.endswith("multilabel"):
        told = f"dict(zip({names!r}, (1 / (1 + np.exp(-output[0]))).tolist()))"
    elif task.endswith("regression"):
        told = f"dict(zip({names!r}, output[0].tolist()))"
    elif task == "segmentation":
        pixels = f"np.bincount(output[0].argmax(0).ravel(), minlength={len(names)})"
        told = f"dict(zip({names!r}, {pixels}.tolist()))"
    else:
        told = shapes
    return f"print({told})\n"


def transformers_program(m: Mapping[str, Any]) -> str:
    """How transformers loads the folder `pretrained`."""
    auto = AUTO_CLASSES.get(m["run"]["task"]["name"], "AutoModelForSequenceClassification")
    inputs = text_inputs(m["preprocess"], "torch.tensor")
    return (
        f"import torch\nfrom tokenizers import Tokenizer\nfrom transformers import {auto}\n\n"
        f"{read_example(m['preprocess'])}"
        f'logits = {auto}.from_pretrained("pretrained").eval()(**{inputs}).logits\n'
        f"print({answer_of_logits(m)})\n"
    )


def timm_program(m: Mapping[str, Any]) -> str:
    """How timm loads the folder `pretrained`."""
    mean, std = list(m["preprocess"]["mean"]), list(m["preprocess"]["std"])
    return (
        "import timm\nfrom PIL import Image, ImageOps\n"
        "from torchvision.transforms.functional import normalize, pil_to_tensor\n\n"
        f"{read_example(m['preprocess'])}"
        f"x = normalize(pil_to_tensor(image) / 255, {mean}, {std})[None]\n"
        'logits = timm.create_model("local-dir:pretrained", pretrained=True).eval()(x)\n'
        f"print({answer_of_logits(m)})\n"
    )


def answer_of_logits(m: Mapping[str, Any]) -> str:
    """What is printed of torch's tensor `logits`: a class, a tag for each token, or the number of
    each label or target.
    """
    names, task = list(m["classes"]), m["run"]["task"]["name"]
    if not names:
        return "logits"
    if task == TAGGING:
        return f"[{names!r}[int(tag)] for tag in logits[0].argmax(-1)]"
    if task.endswith("classification"):
        return f"{names!r}[int(logits[0].argmax())]"
    values = "logits[0].sigmoid()" if task.endswith("multilabel") else "logits[0]"
    return f"dict(zip({names!r}, {values}.tolist()))"
