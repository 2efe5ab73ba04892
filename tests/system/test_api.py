"""tuner.api is what plug-ins import: its names are fixed, and the examples need no others."""

import ast
import importlib
from pathlib import Path

import pytest

from tuner import api

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/plugins").glob("*.py"))

# A name that is removed or renamed here breaks the plug-ins of users: CHANGELOG.md must say so.
NAMES = """
    IGNORED IMAGENET_SPEC IMAGE_NAME NO_OBJECT TEST TRAIN UNSPLIT VALID
    AnnotatedImage Batch Boxes DataError Dataset DetectorHead DetectorStage EngineSettings Epoch
    ExportModule ImageInputSpec ImageOptions ImageStore InputSpec Items Job Labels LossCause
    MakeTargets MaskLegend Masks NextJob Objects OnEnd OnReport Outcome Prediction Recipe RunEnd RunJobs
    ShouldContinue Source SpaceError SplitOptions StagedModel Stall StorageError Targets Task
    TensorTree TextInputSpec TextSource TrackedRun TrackedStudy Tracker TunerError
    assemble_dataset assign_and_limit_splits check_classes classification_dataset content_digest
    decode_texts detection_dataset join_targets load_matching_state load_tokenizer nearest_hint
    open_token_store pad_objects read_state_dict relative_difference run_job segmentation_dataset
    split_sequential suggest_names tree_to_dict trim_padding unpad_objects
""".split()  # noqa: SIM905


def imported_names(node: ast.AST) -> dict[str, list[str]]:
    """The names that a piece of source imports from each module, and from the module itself: []."""
    names: dict[str, list[str]] = {}
    for child in ast.walk(node):
        if isinstance(child, ast.ImportFrom):
            names[str(child.module)] = [alias.name for alias in child.names]
        elif isinstance(child, ast.Import):
            names |= {alias.name: [] for alias in child.names}
    return names


def test_the_public_surface_is_exactly_this() -> None:
    assert sorted(api.__all__) == sorted(NAMES) == sorted(dir(api))
    for module, names in api._NAMES_BY_MODULE.items():
        for name in names:
            assert getattr(api, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match=r"'tuner\.api' has no attribute 'Tsak'"):
        api.Tsak  # noqa: B018


def test_type_checkers_see_the_names_that_are_imported_at_their_first_use() -> None:
    (block,) = [n for n in ast.parse(Path(api.__file__).read_text()).body if isinstance(n, ast.If)]
    assert {m: tuple(n) for m, n in imported_names(block).items()} == api._NAMES_BY_MODULE


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_imports_nothing_else_of_tuner(path: Path) -> None:
    modules = {m for m in imported_names(ast.parse(path.read_text())) if m.split(".")[0] == "tuner"}
    assert modules == (set() if path.name == "make_dots.py" else {"tuner.api"})
