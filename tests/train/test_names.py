"""Where data, model and checkpoint meet, labels are compared by name."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from timm_branches import create_branch_model, load_weights, save_model
from timm_branches.data import label_names
from timm_branches.dense import SegmentationEvaluator
from timm_branches.task import BranchTask, DenseTask, FlatTask
from timm_branches.taxonomy import Taxonomy
from timm_branches.train import FitConfig, evaluate, fit

PATHS = ["animal/cat", "animal/dog", "plant/fern", "plant/moss", "plant/oak"]
TREE = Taxonomy(PATHS, levels=["kind", "species"])


class Named(Dataset):
    """Images that a fixed network tells apart, labelled by the paths of the names."""

    def __init__(self, paths, tree, images):
        self.taxonomy = tree
        self.labels = tree.encode_partial([tuple(path.split("/")) for path in paths])
        self.images = images

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.images[i], self.labels[i]


def make_model(tree=TREE, seed=0):
    torch.manual_seed(seed)
    model = create_branch_model("test_resnet", taps=[4, 5], taxonomy=tree, img_size=32)
    with torch.no_grad():  # answers of every class
        logits = model.eval()(colours())["species"]
        fc = model.head("species").fc
        fc.weight /= logits.std()
        fc.bias.copy_(-logits.mean(0) / logits.std())
    return model


def colours(n=40):
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(n, 3, 1, 1, generator=generator).expand(n, 3, 32, 32)


def answers(model):
    """Images, and what the model says of them, as paths."""
    images = colours()
    with torch.no_grad():
        leaves = model.eval()(images)["species"].argmax(1).tolist()
    assert len(set(leaves)) > 2
    return images, [PATHS[i] for i in leaves]


def loader(data):
    return DataLoader(data, batch_size=8)


def renamed(old, new):
    return Taxonomy([path.replace(old, new) for path in PATHS], levels=TREE.levels)


class TestEvaluate:
    def species(self, data):
        model = make_model()
        return evaluate(BranchTask(model, verbose=False), loader(data)).metrics["species_top1"]

    def test_a_class_less(self):
        """Data without one of the model's classes, numbered on their own."""
        images, paths = answers(make_model())
        lacking = max(set(paths), key=paths.count)
        keep = [i for i, path in enumerate(paths) if path != lacking]
        own = Taxonomy([path for path in PATHS if path != lacking], levels=TREE.levels)
        data = Named([paths[i] for i in keep], own, images[keep])
        assert self.species(data) == 100

    def test_another_order(self):
        images, paths = answers(make_model())
        own = Taxonomy(PATHS[::-1], levels=TREE.levels)
        assert self.species(Named(paths, own, images)) == 100
        wrapped = ConcatDataset([Subset(Named(paths, own, images), range(20))] * 2)
        assert self.species(wrapped) == 100

    def test_another_class(self):
        images, paths = answers(make_model())
        tree = renamed("moss", "most")
        data = Named([path.replace("moss", "most") for path in paths], tree, images)
        with pytest.raises(ValueError, match=r"'plant / most' is only in the data.*may be"):
            self.species(data)

    def test_parts_of_different_order(self):
        images, paths = answers(make_model())
        own = Taxonomy(PATHS[::-1], levels=TREE.levels)
        joined = ConcatDataset([Named(paths, TREE, images), Named(paths, own, images)])
        with pytest.raises(ValueError, match="number their classes differently"):
            self.species(joined)

    def test_flat_task(self):
        torch.manual_seed(0)
        model = create_branch_model("test_resnet", num_classes=5, img_size=32)
        images = colours()
        with torch.no_grad():
            leaves = model.eval()(images)["stage5"].argmax(1).tolist()
        own = Taxonomy(PATHS[::-1], levels=TREE.levels)
        data = Named([PATHS[i] for i in leaves], own, images)
        result = evaluate(FlatTask(model, TREE), loader(data))
        assert result.metrics["species_top1"] == 100

    def test_folders_of_torchvision(self):
        """Class indices (N,) of an alphabetical list become labels of every level."""
        images, paths = answers(make_model())
        classes = ["oak", "moss", "fern", "dog", "cat"]
        names = [path.split("/")[1] for path in paths]
        data = [(image, classes.index(name)) for image, name in zip(images, names, strict=True)]
        loaded = SimpleNamespace(classes=classes, dataset=None)
        batches = loader(data)
        batches.dataset_names = loaded

        class Batches:
            classes = loaded.classes

            def __iter__(self):
                return iter(batches)

        assert self.species_of(Batches()) == 100

    def species_of(self, batches):
        return evaluate(BranchTask(make_model(), verbose=False), batches).metrics["species_top1"]


class TestLabelNames:
    def test_of_a_reader(self):
        data = SimpleNamespace(reader=SimpleNamespace(class_to_idx={"b": 0, "a": 1}))
        assert label_names(data) == ("b", "a")

    def test_of_nothing(self):
        assert label_names([1, 2]) is None
        assert label_names(DataLoader([1, 2])) is None


class TestFit:
    def config(self, folder, **settings):
        return FitConfig(
            epochs=2,
            opt="sgd",
            lr=0.01,
            output=str(folder),
            progress=False,
            plots=False,
            **settings,
        )

    def test_training_in_another_order(self, tmp_path):
        """Labels are translated before the loss: the weights end bit for bit the same."""
        images, paths = answers(make_model())
        states = []
        for name, tree in (("own", TREE), ("other", Taxonomy(PATHS[::-1], levels=TREE.levels))):
            model = make_model()
            fit(
                BranchTask(model, verbose=False),
                loader(Named(paths, tree, images)),
                config=self.config(tmp_path / name),
            )
            states.append(model.state_dict())
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

    def test_refused_before_training(self, tmp_path):
        images, paths = answers(make_model())
        data = Named(paths, TREE, images)
        model = make_model(renamed("oak", "elm"))
        with pytest.raises(ValueError, match="'plant / oak' is only in the data"):
            fit(BranchTask(model, verbose=False), loader(data), config=self.config(tmp_path / "a"))
        other = Named([p.replace("oak", "elm") for p in paths], renamed("oak", "elm"), images)
        model = make_model()
        with pytest.raises(ValueError, match="'plant / elm' is only in the data"):
            fit(
                BranchTask(model, verbose=False),
                loader(data),
                loader(other),
                config=self.config(tmp_path / "b"),
            )
        assert not (tmp_path / "b" / "last.safetensors").exists()

    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            (renamed("oak", "elm"), "'plant / oak' is only in the checkpoint"),
            (Taxonomy(PATHS[::-1], levels=TREE.levels), "in another order"),
        ],
    )
    def test_resume_on_other_labels(self, tmp_path, tree, message):
        images, paths = answers(make_model())
        config = self.config(tmp_path / "run")
        fit(
            BranchTask(make_model(), verbose=False),
            loader(Named(paths, TREE, images)),
            config=config,
        )
        names = [path if path in PATHS and "elm" not in str(tree) else path for path in paths]
        names = [name.replace("oak", "elm") if "elm" in str(tree) else name for name in names]
        data = Named(names, tree, images)
        again = self.config(tmp_path / "run", resume="auto")
        again.epochs = 3
        with pytest.raises(ValueError, match=rf"trained on other labels.*{message}"):
            fit(BranchTask(make_model(tree), verbose=False), loader(data), config=again)


class TestMasks:
    def task(self, names=("sky", "sea", "ship")):
        torch.manual_seed(0)
        model = create_branch_model("test_resnet", taps=[3, 5], head="unet", num_classes=3)
        return DenseTask(
            model,
            "ce",
            lambda **settings: SegmentationEvaluator(list(names), ignore_index=255, **settings),
            ignore_index=255,
        )

    def test_another_order(self):
        task = self.task()
        translate = task.match_labels(("ship", "sky", "sea"))
        masks = torch.tensor([[0, 1, 2, 255]])
        assert translate(masks).tolist() == [[2, 0, 1, 255]]

    def test_equal_or_only_counted(self):
        assert self.task().match_labels(("sky", "sea", "ship")) is None
        assert self.task().match_labels(("0", "1", "2")) is None
        assert self.task(("0", "1", "2")).match_labels(("sky", "sea", "ship")) is None

    def test_others(self):
        with pytest.raises(ValueError, match="'boat' is only in the data"):
            self.task().match_labels(("sky", "sea", "boat"))
        with pytest.raises(ValueError, match="trained on other labels"):
            self.task().check_labels_of({"classes": ["sea", "sky", "ship"]}, "last.safetensors")


class TestLoadWeights:
    def test_rows_are_put_in_order(self, tmp_path):
        model = make_model()
        path = save_model(model, tmp_path / "model.safetensors")
        other = make_model(Taxonomy(PATHS[::-1], levels=TREE.levels), seed=5)
        load_weights(other, path)
        images, paths = answers(model)
        with torch.no_grad():
            leaves = other.eval()(images)["species"].argmax(1)
        assert [PATHS[::-1][i] for i in leaves.tolist()] == paths

    def test_equal_sizes_other_names(self, tmp_path):
        path = save_model(make_model(), tmp_path / "model.safetensors")
        other = make_model(renamed("oak", "elm"), seed=5)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(ValueError, match="'plant / oak' is only in the file"):
            load_weights(other, path)
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_evaluate_without_a_transform_uses_the_models_own():
    """Photographs of another size and range than the model was made for."""
    from timm_branches.data import HierarchicalDataset, create_loader
    from timm_branches.inference import model_transform

    model = make_model()
    rng = torch.Generator().manual_seed(0)
    photos = (torch.rand(24, 48, 64, 3, generator=rng) * 255).byte().numpy()
    labels = TREE.leaf_table[torch.arange(24) % 5]
    results = []
    for transform in (None, model_transform(model)):
        data = HierarchicalDataset(photos, labels, TREE, transform)
        task = BranchTask(model, verbose=False)
        results.append(dict(evaluate(task, create_loader(data, 8)).metrics))
    assert results[0] == results[1]
    data = HierarchicalDataset(photos, labels, TREE)
    raw = evaluate(BranchTask(model, verbose=False), create_loader(data, 8), own_transform=False)
    assert dict(raw.metrics) != results[1]


class TestOneClass:
    """A level of one class: kingdom = Animalia."""

    tree = Taxonomy(["Animalia/cat", "Animalia/dog"], levels=["kingdom", "species"])

    def test_costs_nothing_and_works(self, tmp_path):
        torch.manual_seed(0)
        model = create_branch_model("test_resnet", taps=[4, 5], taxonomy=self.tree, img_size=32)
        x = colours(16)
        data = Named(["Animalia/cat", "Animalia/dog"] * 8, self.tree, x)
        task = BranchTask(model, verbose=False)
        losses = task(x, data.labels)["losses"]
        assert losses["kingdom"] == 0
        assert losses["species"] > 0
        config = FitConfig(
            epochs=1, output=str(tmp_path / "run"), progress=False, opt="sgd", lr=0.01, check=False
        )
        result = fit(task, loader(data), loader(data), config)
        assert result.best["kingdom_top1"] == 100
        for decoder in ("independent", "top-down", "best-path", "leaf-marginal", "crm"):
            metrics = evaluate(task, loader(data), decoder=decoder).metrics
            assert metrics["kingdom_top1"] == 100
            assert metrics["consistency"] == 100

    def test_predict(self):
        from timm_branches.inference import predict

        torch.manual_seed(0)
        model = create_branch_model("test_resnet", taps=[4, 5], taxonomy=self.tree, img_size=32)
        images = (torch.rand(2, 32, 32, 3) * 255).byte().numpy()
        for record in predict(model, list(images)):
            assert record.path[0] == "Animalia"
