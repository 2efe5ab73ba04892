"""README.md of an export: how a program loads each format without tuner."""

from collections.abc import Mapping
from typing import Any

TAGGING = "token_classification"
AUTO_CLASSES = {
    "text_generation": "AutoModelForCausalLM",
    TAGGING: "AutoModelForTokenClassification",
}
"""transformers' class by task; of other tasks the one for whole texts."""
ONNX_FORMATS = ("onnx", "onnx_fp16", "onnx_int8")
OPENING = """# {title}

{meaning}. What the model is, how it was made and how well it does is in [MODEL_CARD.md](MODEL_CARD.md); `manifest.json` has all of it for programs. `tuner predict` and `tuner.load` read this folder as it is. Nothing below needs tuner; run it in this folder, with {input} in the place of `{placeholder}`.
"""
READ_IMAGE = """import numpy as np
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("{placeholder}")).convert("RGB")
scale = {scale}
image = image.resize([max({least}, int(side * scale)) for side in image.size], Image.Resampling.{filter})
left, top = round((image.width - {size}) / 2), round((image.height - {size}) / 2)
image = image.crop((left, top, left + {size}, top + {size}))
x = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255
"""
READ_LETTERBOX = """import numpy as np
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("{placeholder}")).convert("RGB")
scale = {size} / max(image.size)
image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.{filter})
canvas = Image.new("RGB", ({size}, {size}), (114, 114, 114))
canvas.paste(image, (({size} - image.width) // 2, ({size} - image.height) // 2))
x = np.asarray(canvas, np.float32).transpose(2, 0, 1)[None] / 255
"""
READ_TEXT = """import numpy as np
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer/tokenizer.json")
tokenizer.enable_truncation({length})
tokenizer.no_padding()
text = tokenizer.encode("{placeholder}")
values = {{"input_ids": text.ids, "attention_mask": text.attention_mask, "token_type_ids": text.type_ids}}
x = {{name: np.array([values[name]], np.int64) for name in {inputs}}}
"""


def format_readme(m: Mapping[str, Any]) -> str:
    """The README of an export, from its manifest."""
    preprocess, run = m["preprocess"], m["run"]
    is_text = preprocess["kind"] == "tokens"
    placeholder = "some text" if is_text else "image.jpg"
    meaning = str(m["output"]["meaning"])
    parts = [
        OPENING.format(
            title=f"{run['model']['name']} for {run['task']['name'].replace('_', ' ')}",
            meaning=f"Output: {meaning}",
            input="a text" if is_text else "an image of yours",
            placeholder=placeholder,
        )
    ]
    reading = read_example(preprocess, placeholder)
    answer = format_answer(m)
    for name, entry in m["exports"].items():
        program = PROGRAMS.get(name)
        if program is not None:
            parts.append(f"## {name}\n\n```python\n{program(m, entry, reading)}{answer}```\n")
    if "pretrained" in m["exports"]:
        parts.append(f"## pretrained\n\n```python\n{pretrained_program(m, reading)}```\n")
    return "\n".join(parts)


def read_example(preprocess: Mapping[str, Any], placeholder: str) -> str:
    """The lines that make `x` of an image or a text."""
    if preprocess["kind"] == "tokens":
        inputs = list(preprocess["leaves"])
        return READ_TEXT.format(
            length=preprocess["length"], placeholder=placeholder, inputs=repr(inputs)
        )
    size, resize = preprocess["size"], preprocess["resize"]
    values = {
        "placeholder": placeholder,
        "size": size,
        "least": resize,
        "scale": f"{resize} / min(image.size)",
        "filter": preprocess["interpolation"].upper(),
    }
    template = READ_LETTERBOX if preprocess["fit"] == "letterbox" else READ_IMAGE
    return template.format(**values)


def format_answer(m: Mapping[str, Any]) -> str:
    """The lines that print what `output` says."""
    classes, task = m["classes"], m["run"]["task"]["name"]
    if not task.endswith("classification") or not classes:
        return "print({name: values.shape for name, values in outputs.items()})\n"
    if task == TAGGING:
        return (
            f"classes = {list(classes)!r}\n"
            'print([classes[int(tag)] for tag in outputs["output"][0].argmax(-1)])\n'
        )
    return (
        f"classes = {list(classes)!r}\n"
        'logits = outputs["output"][0]\n'
        "probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()\n"
        "print(classes[int(logits.argmax())], round(float(probabilities.max()), 4))\n"
    )


def onnx_program(m: Mapping[str, Any], entry: Mapping[str, Any], reading: str) -> str:
    feed = "x" if m["preprocess"]["kind"] == "tokens" else '{"image": x}'
    return (
        f"import onnxruntime\n{reading}\n"
        f'session = onnxruntime.InferenceSession("{entry["file"]}")\n'
        "names = [output.name for output in session.get_outputs()]\n"
        f"outputs = dict(zip(names, session.run(names, {feed})))\n"
    )


def openvino_program(m: Mapping[str, Any], entry: Mapping[str, Any], reading: str) -> str:
    feed = "x" if m["preprocess"]["kind"] == "tokens" else '{"image": x}'
    return (
        f"import openvino\n{reading}\n"
        f'model = openvino.Core().compile_model("{entry["file"]}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})\n'
        f"result = model({feed})\n"
        "outputs = {next(iter(o.names)): result[o] for o in model.outputs}\n"
    )


def torch_program(m: Mapping[str, Any], entry: Mapping[str, Any], reading: str) -> str:
    convert = (
        "{name: torch.from_numpy(array) for name, array in x.items()}"
        if m["preprocess"]["kind"] == "tokens"
        else "torch.from_numpy(x)"
    )
    return (
        f"import torch\n{reading}\n"
        f'model = torch.export.load("{entry["file"]}").module()\n'
        f"result = model({convert})\n"
        'result = result if isinstance(result, dict) else {"output": result}\n'
        "outputs = {name: value.detach().numpy() for name, value in result.items()}\n"
    )


PROGRAMS = {
    **dict.fromkeys(ONNX_FORMATS, onnx_program),
    "openvino": openvino_program,
    "torch_export": torch_program,
}


def pretrained_program(m: Mapping[str, Any], reading: str) -> str:
    """How transformers or timm load the folder `pretrained`."""
    preprocess = m["preprocess"]
    if preprocess["kind"] == "tokens":
        auto = AUTO_CLASSES.get(m["run"]["task"]["name"], "AutoModelForSequenceClassification")
        return (
            "import torch\n"
            f"from transformers import {auto}\n{reading}\n"
            f'model = {auto}.from_pretrained("pretrained").eval()\n'
            "with torch.no_grad():\n"
            "    logits = model(**{name: torch.from_numpy(v) for name, v in x.items()}).logits\n"
            f"print({answer_of_logits(m)})\n"
        )
    mean, std = preprocess["mean"], preprocess["std"]
    return (
        "import timm\nimport torch\n"
        f"{reading}\n"
        'model = timm.create_model("local-dir:pretrained", pretrained=True).eval()\n'
        f"mean, std = torch.tensor({list(mean)}), torch.tensor({list(std)})\n"
        "with torch.no_grad():\n"
        "    logits = model((torch.from_numpy(x) - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))\n"
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
