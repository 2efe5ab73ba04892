"""Tries one small member of every family of models, and writes into docs/models.md where it can be cut.

    python benchmarks/stages.py [--numbers] [--only PATTERN]

Every model is built with fresh parameters. Without --numbers it is built on torch's meta device, where tensors have sizes and no
numbers: that takes a second or so for each, and shows the stages. With --numbers it is built in memory, and its stages are compared
with the model, bit by bit, which takes minutes for all of them.
"""

import argparse
import fnmatch
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tuner.config import plugins
from tuner.config.run import PluginConfig, Recipe, Run
from tuner.core.types import StagedModel
from tuner.errors import limit_listing
from tuner.models._transformer_stages import stage_transformer
from tuner.training.building import build_model
from tuner.training.model_summary import shorten_stages

PATH = Path(__file__).parents[1] / "docs" / "models.md"
# one small member of each file of timm's, and of kinds of models that many fine-tune
TIMM = (
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coat_tiny",
    "coatnet_nano_rw_224",
    "convit_tiny",
    "convmixer_768_32",
    "convnext_atto",
    "convnextv2_atto",
    "cpubone_nano",
    "crossvit_tiny_240",
    "cs3darknet_s",
    "csatv2",
    "cspnext_tiny",
    "cspresnet50",
    "davit_tiny",
    "deepseek_vit_412m",
    "deit_tiny_distilled_patch16_224",
    "densenet121",
    "dla46_c",
    "dpn68",
    "eca_botnext26ts_256",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvim_m1",
    "efficientvit_b0",
    "efficientvit_m0",
    "ese_vovnet19b_slim",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "gemma4_vit_167m",
    "ghostnet_050",
    "hardcorenas_a",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "hieradet_small",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "inception_resnet_v2",
    "inception_v3",
    "inception_v4",
    "lcnetv2_small",
    "legacy_seresnet18",
    "levit_128s",
    "lowformer_b0",
    "maxvit_pico_rw_256",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "mobilenetv5_base",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "naflexvit_base_patch16_siglip",
    "nasnetalarge",
    "nest_tiny",
    "nextvit_small",
    "nfnet_l0",
    "pit_ti_224",
    "pnasnet5large",
    "poolformer_s12",
    "pvt_v2_b0",
    "qwen3_vit_88m",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m0_9",
    "res2net50_14w_8s",
    "resnest14d",
    "resnetv2_18",
    "rexnet_100",
    "samvit_base_patch16",
    "selecsls42",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_cr_tiny_224",
    "swinv2_tiny_window8_256",
    "test_byobnet",
    "test_efficientnet",
    "test_mambaout",
    "test_maxvit",
    "test_nfnet",
    "test_resnet",
    "test_vit",
    "test_vit_relpos",
    "tiny_vit_5m_224",
    "tnt_s_patch16_224",
    "tresnet_m",
    "twins_svt_small",
    "vgg11",
    "visformer_tiny",
    "vit_base_patch32_clip_224",
    "vit_base_patch32_siglip_256",
    "vit_pe_core_tiny_patch16_384",
    "vit_small_patch14_dinov2",
    "vit_small_patch16_dinov3",
    "vit_tiny_r_s16_p8_224",
    "vitamin_small_224",
    "volo_d1_224",
    "legacy_xception",
    "xception41",
    "xcit_nano_12_p16_224",
)
TORCHVISION = (
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "swin_v2_t",
    "vgg11",
    "vit_b_32",
)
SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "num_labels": 3,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
WINDOWED = {**GROUPED, "sliding_window": 8}
# model_type -> a small configuration of it
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "albert": {**SMALL, "embedding_size": 8, "num_hidden_groups": 3},
    "bert": SMALL,
    "camembert": {**SMALL, "pad_token_id": 1},
    "deberta-v2": {
        **SMALL,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "conv_kernel_size": 3,
        "pooler_hidden_size": 16,
    },
    "distilbert": {
        "vocab_size": 60,
        "dim": 16,
        "n_layers": 3,
        "n_heads": 2,
        "hidden_dim": 32,
        "num_labels": 3,
    },
    "electra": {**SMALL, "embedding_size": 8},
    "modernbert": {**SMALL, "local_attention": 8, "global_attn_every_n_layers": 2},
    "mpnet": {**SMALL, "pad_token_id": 1},
    "roberta": {**SMALL, "pad_token_id": 1},
    "xlm-roberta": {**SMALL, "pad_token_id": 1},
    "gemma": {**GROUPED, "tie_word_embeddings": True},
    "gemma2": {**WINDOWED, "tie_word_embeddings": True},
    "gemma3_text": {**WINDOWED, "tie_word_embeddings": True},
    "gpt2": {
        "vocab_size": 60,
        "n_embd": 16,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 3,
    },
    "gpt_neox": SMALL,
    "llama": {**GROUPED, "tie_word_embeddings": True},
    "mistral": WINDOWED,
    "olmo2": GROUPED,
    "phi": SMALL,
    "phi3": {**SMALL, "sliding_window": 8},
    "qwen2": {**WINDOWED, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": GROUPED,
    "smollm3": GROUPED,
}
# (name, task) of a small member of each family whose models are not classifiers
OTHERS = (
    ("fasterrcnn_mobilenet_v3_large_320_fpn", "detection"),
    ("fasterrcnn/timm/mobilenetv3_small_050", "detection"),
    ("retinanet_resnet50_fpn", "detection"),
    ("retinanet/timm/mobilenetv3_small_050", "detection"),
    ("fcos_resnet50_fpn", "detection"),
    ("fcos/timm/mobilenetv3_small_050", "detection"),
    ("ssdlite320_mobilenet_v3_large", "detection"),
    ("ssd300_vgg16", "detection"),
    ("yolox_nano", "detection"),
    ("yolov9_t", "detection"),
    ("rtdetr_r18", "detection"),
    ("dfine_n", "detection"),
    ("maskrcnn_resnet50_fpn", "instance_segmentation"),
    ("maskrcnn/timm/mobilenetv3_small_050", "instance_segmentation"),
    ("fcn_resnet50", "segmentation"),
    ("deeplabv3_mobilenet_v3_large", "segmentation"),
    ("lraspp_mobilenet_v3_large", "segmentation"),
    ("unet/resnet18", "segmentation"),
    ("unetplusplus/resnet18", "segmentation"),
    ("fpn/resnet18", "segmentation"),
    ("manet/resnet18", "segmentation"),
    ("linknet/resnet18", "segmentation"),
    ("pan/resnet18", "segmentation"),
    ("pspnet/resnet18", "segmentation"),
    ("upernet/resnet18", "segmentation"),
    ("deeplabv3/resnet18", "segmentation"),
    ("deeplabv3plus/resnet18", "segmentation"),
    ("segformer/mit_b0", "segmentation"),
    ("dpt/tu-test_vit", "segmentation"),
    ("unet/efficientnet-b0", "segmentation"),
)
MAX_LISTED = 6  # names of models in a row of the table of tasks
DECODERS = tuple(TRANSFORMERS)[list(TRANSFORMERS).index("gemma") :]
OPENING = """# Models and where they are cut

Freeze depth *k* freezes the first *k* stages of a model. This page is generated by `python benchmarks/stages.py`, which builds one small member of each family with random weights. Each of them is cut by the same lines as its larger sisters: `tuner models NAME` shows the stages of any of them, and `tuner models 'timm/*dinov2*'` those of many.

Columns: the number of freeze depths that are not 0, and the stages; or why there are not more of them. *Numbers* says whether the stages in a row were compared with the model bit by bit here, or in the tests; the others were compared by the sizes of their outputs alone. None of them was tried with pretrained weights here; what loads these is tested with ResNet-18, EfficientNet-Lite0 and MiniLM.

All 1,826 names that timm 1.0.31 has weights for build, and what their own models hold for their own classes fits but for the classifiers (`python benchmarks/timm_names.py`, by names and shapes). Where `data.size` is not the size that a model is made for, timm resamples the weights of ViTs, BEiTs, EVAs, Swins and MaxViTs; those of CaiT, CrossViT, LeViT, PiT, NesT, Hiera, GC ViT, BoTNets, EfficientFormers, the mixers and CLIP's ResNets it does not, and `tuner check` refuses them.
"""


def build_image_model(name: str, device: str, task: str = "classification") -> StagedModel:
    """A model of images with fresh parameters."""
    keys = plugins.read_keys("model", name).fields
    model = PluginConfig(name, {key: "none" for key in ("weights", "backbone") if key in keys})
    run = Run(PluginConfig(task, {}), PluginConfig("synthetic", {}), model, Recipe(), 0)
    with torch.device(device):
        return build_model(run, Path(), 3)


def build_text_model(kind: str, task: str) -> StagedModel:
    """A small transformer of a model type; it is always built in memory."""
    import transformers

    config = transformers.AutoConfig.for_model(kind, **TRANSFORMERS[kind])
    auto = transformers.AutoModelForSequenceClassification
    if task == "text_generation":
        auto = transformers.AutoModelForCausalLM
    if task == "token_classification":
        auto = transformers.AutoModelForTokenClassification
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32)
    model.config.use_cache = False
    return stage_transformer(model, task, ())


def text_members() -> Iterator[tuple[str, str]]:
    """(model type, task) of every transformer that is tried."""
    import transformers

    tagging = transformers.AutoModelForTokenClassification._model_mapping
    for kind in TRANSFORMERS:
        yield kind, "text_classification"
        if transformers.CONFIG_MAPPING[kind] in tagging:
            yield kind, "token_classification"
        if kind in DECODERS:
            yield kind, "text_generation"


def task_table() -> Iterator[str]:
    """Which families of models each task has."""
    yield from ("", "## Tasks", "", "| task | models |", "|---|---|")
    for task in plugins.list_names("task"):
        families: dict[str, list[str]] = {}
        for name in plugins.list_names("model"):
            family = plugins.find_model_family(name)
            if family is not None and task in plugins.list_tasks("model", name):
                families.setdefault(family, []).append(f"`{name}`")
        listed = "; ".join(
            f"{family}: {', '.join(limit_listing(names, MAX_LISTED))}"
            for family, names in families.items()
        )
        yield f"| `{task}` | {listed} |"
    yield from (
        "",
        "`multilabel` and `regression` have the stages of `classification`, `text_multilabel` and "
        "`text_regression` those of `text_classification`: only the number of outputs differs.",
    )


def table_row(name: str, staged: StagedModel, numbers: str) -> str:
    """One line of a table in Markdown; `numbers`: yes, sizes, or tests."""
    stages = shorten_stages(list(staged.stages))
    if staged.uncut_reason:
        stages += f" ({staged.uncut_reason})".replace("|", "/")
    return f"| `{name}` | {staged.max_depth} | {stages} | {numbers} |"


def make_tables(pattern: str, device: str) -> Iterator[str]:
    """The lines of the page."""
    head = ("| model | depths | stages | numbers |", "|---|---|---|---|")
    numbers = "sizes" if device == "meta" else "yes"
    yield from task_table()
    for title, names in (
        ("timm", [f"timm/{name}" for name in TIMM]),
        ("torchvision", list(TORCHVISION)),
    ):
        yield from ("", f"## {title}", "", *head)
        for name in fnmatch.filter(names, pattern):
            start = time.monotonic()
            staged = build_image_model(name, device)
            print(f"{name}: {staged.max_depth}, {time.monotonic() - start:.1f} s", flush=True)
            yield table_row(name, staged, numbers)
    yield from ("", "## Detection and segmentation", "", *head)
    for name, task in OTHERS:
        if fnmatch.fnmatch(name, pattern):
            yield table_row(f"{name}, {task}", build_image_model(name, "cpu", task), "tests")
    yield from ("", "## transformers", "", *head)
    for kind, task in text_members():
        if fnmatch.fnmatch(kind, pattern):
            yield table_row(f"{kind}, {task}", build_text_model(kind, task), "yes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", action="store_true")
    parser.add_argument("--only", default="*", metavar="PATTERN")
    args = parser.parse_args()
    lines = list(make_tables(args.only, "cpu" if args.numbers else "meta"))
    text = OPENING + "\n".join(lines) + "\n"
    if args.only == "*":
        PATH.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
