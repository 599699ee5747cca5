"""The typed schema: good configs, and one clear line for each way to get one wrong."""

import json
import re
from pathlib import Path

import pytest

from models import catalogue
from tests.methods import METHODS
from utils.config import read
from utils.config.schema import Config, as_dict, differences, keys_of
from utils.config.show import help_text, markdown
from utils.errors import UserError

KNOWN = {"methods": catalogue.methods(), "backbones": catalogue.backbones()}
GOOD = {"dataset": "D", "init_cls": 2, "increment": 2, "model_name": "der", "convnet_type": "resnet8"}
EXPS = [
    file
    for file in sorted((Path(__file__).parent.parent / "exps").glob("*.json"))
    if not file.stem.startswith(("pareto", "compare"))  # sweeps and tables: test_pareto.py, test_compare.py
]


def load(tmp_path, values=None, *overrides, drop=()):
    file = tmp_path / "config.json"
    values = {key: value for key, value in {**GOOD, **(values or {})}.items() if key not in drop}
    file.write_text(json.dumps(values), encoding="utf-8")
    return read.load_config(file, overrides, **KNOWN)


def test_defaults_are_the_papers(tmp_path):
    config = load(tmp_path)
    assert config.init_epoch is config.milestones is config.weight_decay is config.scheduler is None, "the method's own"
    assert (config.init_lr_decay, config.lrate_decay) == (0.1, 0.1)
    assert (config.batch_size, config.momentum, config.T, config.seed) == (128, 0.9, 2.0, [1993])


def test_the_seeds_experiment():
    config = read.load_config(EXPS[0].parent / "config.json", **KNOWN)
    assert (config.dataset, config.model_name, config.convnet_type) == ("Food101", "der", "resnet18")
    assert (config.init_cls, config.increment, config.seed) == (51, 5, [1993])
    assert (config.memory_per_class, config.real_per_class, config.syn_per_class) == (20, 18, 48)
    assert config.augmentations_per_image == 5
    assert 0 < config.augmentation_prob < 1
    assert config.output_dir == "outputs/Food101-der-resnet18-escort-real18-syn48"


@pytest.mark.parametrize("file", EXPS, ids=[file.name for file in EXPS])
def test_every_example_is_valid(file):
    read.load_config(file, **KNOWN)


def test_every_method_has_an_example():
    for method in METHODS:
        assert read.load_config(EXPS[0].parent / f"{method}.json", **KNOWN).model_name == method


def test_the_examples_write_out_the_methods_own_schedules():
    for name, method in METHODS.items():
        written = json.loads((EXPS[0].parent / f"{name}.json").read_text())
        for key, value in method.defaults._asdict().items():
            assert written.get(key, value) in (value, list(value) if isinstance(value, tuple) else value), (name, key)


def test_overrides_have_types_and_reach_other_keys(tmp_path):
    config = load(
        tmp_path,
        {"output_dir": "out/${model_name}-${real_per_class}"},
        "real_per_class=7", "seed=[2]", "milestones=[3]", "lrate=1e-3", "shuffle=false", "device=cpu",
    )  # fmt: skip
    assert config.output_dir == "out/der-7"
    assert (config.seed, config.milestones, config.lrate) == ([2], [3], 0.001)
    assert config.shuffle is False
    assert config.device == "cpu"
    assert load(tmp_path, None, "seed=5").seed == [5]
    assert load(tmp_path, {"milestones": [3]}, "milestones=null").milestones is None
    assert load(tmp_path, None, "data_dir=/a b/ü=c").data_dir == "/a b/ü=c"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"memory_per_clas": 20}, r"unknown key 'memory_per_clas'; did you mean 'memory_per_class'"),
        ({"xyzzy": 1}, r"unknown key 'xyzzy'; .*--help-config"),
        ({"batch_size": "128"}, r"batch_size must be a valid integer, not \"128\""),
        ({"batch_size": 12.5}, r"batch_size must be a valid integer, not 12.5"),
        ({"batch_size": True}, r"batch_size must be a valid integer, not true"),
        ({"batch_size": None}, r"batch_size must be a valid integer, not null"),
        ({"batch_size": 0}, r"batch_size must be greater than or equal to 1"),
        ({"lrate": "fast"}, r"lrate must be a valid number"),
        ({"lrate": float("nan")}, r"lrate must be a finite number"),
        ({"lrate": 0}, r"lrate must be greater than 0"),
        ({"init_lr_decay": -1}, r"init_lr_decay must be greater than 0"),
        ({"shuffle": "yes"}, r"shuffle must be a valid boolean"),
        ({"shuffle": 1}, r"shuffle must be a valid boolean"),
        ({"milestones": [80, "x"]}, r"milestones\[1\] must be a valid integer"),
        ({"milestones": [0]}, r"milestones\[0\] must be greater than or equal to 1"),
        ({"seed": []}, r"seed must list one or more different values"),
        ({"seed": [1, 1]}, r"seed must list one or more different values"),
        ({"seed": "one"}, r"seed\[0\] must be a valid integer, not \"one\""),
        ({"model_name": "dr"}, r"model_name must be one of .*, not \"dr\"; did you mean \'der\'"),
        ({"convnet_type": "pretrained_vit_b16_224_in21k"}, r"did you mean 'timm/vit_base_patch16_224.augreg_in21k'"),
        ({"convnet_type": "vit_small_patch16_224"}, r"did you mean 'timm/vit_small_patch16_224'"),
        ({"backbone_type": "resnet81"}, r"convnet_type is given twice, once as backbone_type"),
        ({"convnet_type": "resnet81"}, r"convnet_type must be one of .*did you mean 'resnet8"),
        ({"dataset": "../D"}, r"dataset must be the name of a folder"),
        ({"augmentation_prob": 1.5}, r"augmentation_prob must be less than or equal to 1"),
        ({"augmentation_scope": "none"}, r"augmentation_scope must be 'all' or 'exemplars'"),
        ({"regenerate": "later"}, r"regenerate must be 'ahead' or 'on_demand'"),
        ({"val_per_class": 3, "memory_only": True}, r"val_per_class: memory_only may lose the train images"),
        ({"real_per_class": -1}, r"real_per_class must be greater than or equal to 0"),
        ({"real_per_class": 21}, r"21 real exemplars cost 21 units, more than memory_per_class = 20"),
        ({"syn_per_class": 3, "augmentations_per_image": 0}, r"augmentations_per_image must be at least 1"),
        ({"augmentation_prob": 0.1, "augmentations_per_image": 0}, r"augmentations_per_image must be at least 1"),
        ({"fixed_memory": False}, r"memory_size must be given where fixed_memory is false"),
        ({"fixed_memory": False, "memory_size": -1}, r"memory_size must be greater than or equal to 0"),
        ({"exemplar_selection": "best"}, r"exemplar_selection must be 'herding', 'random' or 'closest'"),
        ({"scheduler": "linear"}, r"scheduler must be 'steps' or 'cosine'"),
        ({"beta1": 1}, r"beta1 must be less than 1"),
        ({"model_name": "gem", "precision": "16-mixed"}, r"precision: 16-mixed .*bf16-mixed"),
        ({"accumulate_batches": 0}, r"accumulate_batches must be greater than or equal to 1"),
        ({"accumulate_batches": 9, "batch_size": 8}, r"accumulate_batches: a batch of 8 images .* in 9 parts"),
        ({"split_ratio": -0.1}, r"split_ratio must be greater than or equal to 0"),
        ({"nb_proxy": 0}, r"nb_proxy must be greater than or equal to 1"),
        ({"sinkhorn": 0}, r"sinkhorn must be greater than 0"),
        ({"oofc": "zero"}, r"oofc must be 'ft' or 'az'"),
        ({"device": "gpu"}, r"device must be \"auto\""),
        ({"device": ["x"]}, r"device must be \"auto\""),
        ({"device": []}, r"device must be \"auto\""),
        ({"precision": "fp8"}, r"precision must be '32-true', 'bf16-mixed' or"),
        ({"momentum": 1}, r"momentum must be less than 1"),
        ({"num_workers": -1}, r"num_workers must be greater than or equal to 0"),
        ({"output_dir": "${nope}"}, r"output_dir: .*\$\{nope\} is no other key's value"),
        ({"prefix": "${oc.env:PATH}"}, r"prefix: .*\$\{oc.env:PATH\} is no other key's value"),
        ({"prefix": "a${dataset"}, r"prefix: .*a reference has the form \$\{key\}"),
        ({"prefix": "${dataset.${model_name}}"}, r"prefix: .*\$\{key\}"),
        ({"prefix": "a${prefix}"}, r"prefix -> prefix refers to itself"),
        ({"shuffle": False, "seed": [1, 2]}, r"shuffle: false gives one order of classes; seed must be one number"),
    ],
)  # fmt: skip
def test_one_line_for_each_mistake(tmp_path, values, words):
    with pytest.raises(UserError) as error:
        load(tmp_path, values)
    assert re.search(words, str(error.value))
    assert len(str(error.value).splitlines()) == 1


def test_all_problems_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load(tmp_path, {"batch_size": "x", "nope_key": 1, "lrate": -1}, "no-equals-sign", drop=["dataset"])
    lines = str(error.value).splitlines()
    assert "5 problems" in lines[0]
    for word in ("batch_size", "nope_key", "lrate", "no-equals-sign", "dataset is not given"):
        assert sum(word in line for line in lines[1:]) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON: line 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "a is given 2 times"),
        ("[1]", "one JSON object"),
        ('{"a": 1,}', "not valid JSON"),
        ("\xff", "JSON"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, words):
    file = tmp_path / "c.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read.load_config(file, **KNOWN)
    with pytest.raises(UserError, match=r"exps/config\.json"):
        read.load_config(tmp_path / "none.json", **KNOWN)
    with pytest.raises(UserError, match="can't be read"):
        read.load_config(tmp_path, **KNOWN)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("cpu", "cpu"),
        (["0", "2"], [0, 2]),
        ([1], [1]),
        ("3", [3]),
        ([-1], "cpu"),
        (["-1"], "cpu"),
        ("cuda:0", [0]),
        (["cuda:0", "cuda:1"], [0, 1]),
        (2, [2]),
    ],
)
def test_devices_as_pycil_and_torch_write_them(tmp_path, given, meant):
    assert load(tmp_path, {"device": given}).device == meant
    text = given if isinstance(given, str) else json.dumps(given)
    assert load(tmp_path, None, f"device={text}").device == meant


def test_text_keys_take_text(tmp_path, monkeypatch):
    """Numbers and booleans as a user types them, and whatever YAML or a shell might make of the rest."""
    monkeypatch.setenv("HOME", "/home/me")
    numbers = load(tmp_path, {"prefix": 12345, "dataset": 101, "variant": True})
    assert (numbers.prefix, numbers.dataset, numbers.variant) == ("12345", "101", "true")
    for text in ("12345", "no", "1e3", "null", "a #3", "a: b", "[1", "{x", "0o17", "~"):
        assert load(tmp_path, None, f"prefix={text}").prefix == text
        assert load(tmp_path, None, f"output_dir=runs/{text}").output_dir == f"runs/{text}"
    for key in ("output_dir", "data_dir", "phase0_cache"):
        assert getattr(load(tmp_path, None, f"{key}=~/x"), key) == "/home/me/x"
        assert getattr(load(tmp_path, {key: "~/x"}), key) == "/home/me/x"
    assert load(tmp_path, None, "data_dir=null").data_dir is None


def test_lists_with_commas(tmp_path):
    for text in ("1993,1994", "[1993, 1994]", " 1993 , 1994"):
        assert load(tmp_path, None, f"seed={text}").seed == [1993, 1994]
        assert load(tmp_path, {"seed": text}).seed == [1993, 1994]
    assert load(tmp_path, {"milestones": 80}).milestones == [80]


def test_where_a_mistake_is(tmp_path):
    """In the file, or in the override as typed."""
    for values, override, words in (
        ({"lrate": -1}, "epochs=3", "config.json: lrate must be greater than 0"),
        ({}, "lrate=-1", "lrate=-1: lrate must be greater than 0, not -1"),
        ({}, "lrat=1", "lrat=1: unknown key"),
        ({"memory_per_class": 2}, "real_per_class=4", "real_per_class=4: real_per_class"),
    ):
        with pytest.raises(UserError) as error:
            load(tmp_path, values, override)
        assert words in str(error.value)
        assert ("config.json" in str(error.value)) == words.startswith("config.json")


def test_a_folder_of_its_own(tmp_path):
    folders = {
        load(tmp_path, None, override).output_dir
        for override in ("epochs=1", "dataset=E", "model_name=wa", "convnet_type=resnet32", "init_cls=4", "increment=1")
    }
    assert len(folders) == 6
    assert "outputs/D-der-resnet8-2+2" in folders


def test_real_exemplars_that_fit(tmp_path):
    assert load(tmp_path, None, "memory_per_class=25").real_per_class == 25
    assert load(tmp_path, None, "memory_per_class=5.5").real_per_class == 5
    assert load(tmp_path).real_per_class == 20
    assert load(tmp_path, {"fixed_memory": False, "memory_size": 9, "memory_per_class": 0}).real_per_class == 1
    assert load(tmp_path, None, "memory_per_class=25", "real_per_class=3").real_per_class == 3


def test_differences_leave_out_what_changes_no_number(tmp_path):
    config = load(tmp_path)
    ours = as_dict(config)
    assert differences(config, {**ours, "num_workers": 3, "output_dir": "x", "seed": [1], "device": "cpu"}) == []
    assert differences(config, {**ours, "real_per_class": 3}) == ["real_per_class: 3 -> 20"]
    assert differences(config, {**ours, "another": 3}) == ["another: 3 -> not given"]


def test_the_case_of_a_dataset_s_name_is_no_difference(tmp_path):
    config = load(tmp_path)
    assert differences(config, {**as_dict(config), "dataset": config.dataset.upper()}) == []
    assert differences(config, {**as_dict(config), "dataset": "other"}) == [f'dataset: "other" -> "{config.dataset}"']


def test_a_key_that_is_younger_than_a_record_was_its_default_then(tmp_path):
    older = {key: value for key, value in as_dict(load(tmp_path)).items() if key != "batch_size"}
    assert differences(load(tmp_path), older) == []
    assert differences(load(tmp_path, {"batch_size": 64}), older) == ["batch_size: 128 -> 64"]


@pytest.mark.parametrize("name", ["cifar100_aa", "cifar10_aa"])
def test_pycil_s_datasets_with_autoaugment(tmp_path, name):
    config = load(tmp_path, {"dataset": name})
    assert (config.dataset, config.augmentation) == (name.removesuffix("_aa"), "autoaugment")
    assert load(tmp_path, {"dataset": name, "augmentation": "pycil"}).augmentation == "pycil"
    assert load(tmp_path).augmentation == "pescr"


def test_help_names_every_key_and_fits_the_terminal():
    text = help_text(**KNOWN, width=80)
    named = re.findall(r"^  (\w+): (?:default|required)", text, re.M)
    assert set(keys_of(Config)) <= set(named)
    assert max(map(len, text.splitlines())) <= 80
    assert "batch_size: default 128" in text
    assert "list of (integer >= 1) or null" in text
    for method in METHODS:
        assert method in text


def test_the_page_of_keys_is_the_schemas():
    assert (EXPS[0].parent.parent / "docs" / "config.md").read_text() == markdown(**KNOWN), (
        "run: python -m models.catalogue > docs/config.md"
    )


def test_increments_and_class_orders(tmp_path):
    assert load(tmp_path, {"increment": [3, 1]}).increment == [3, 1]
    assert load(tmp_path, None, "increment=3,1").increment == load(tmp_path, None, "increment=[3, 1]").increment
    assert load(tmp_path, None, "increment=3").increment == 3
    assert load(tmp_path, None, "increment=0").increment == 0
    assert load(tmp_path, None, "increment=3,1").output_dir == "outputs/D-der-resnet8-2+3+1"
    assert load(tmp_path, None, "class_order=[b, a]").class_order == ["b", "a"]
    assert load(tmp_path, {"class_order": [1, 0]}).class_order == [1, 0]
    for name, content in (("order.json", '["b", "apple pie"]'), ("order.txt", "b\n\napple pie\n")):
        (tmp_path / name).write_text(content)
        assert load(tmp_path, {"class_order": str(tmp_path / name)}).class_order == ["b", "apple pie"]
        assert load(tmp_path, None, f"class_order={tmp_path / name}").class_order == ["b", "apple pie"]
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for values, words in (
        ({"increment": -1}, "increment must be greater than or equal to 0"),
        ({"increment": [3, 0]}, r"increment\[1\] must be greater than or equal to 1"),
        ({"class_order": "none.txt"}, "class_order names a file that can't be read"),
        ({"class_order": str(tmp_path / "deep.json")}, "class_order names a list that can't be read: .*too deeply"),
        ({"class_order": [1, 1]}, "class_order must list one or more different values"),
        ({"class_order": [1, 0], "seed": [1, 2]}, "class_order is one order of classes"),
    ):
        with pytest.raises(UserError, match=words):
            load(tmp_path, values)
