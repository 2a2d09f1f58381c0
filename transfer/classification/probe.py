"""One evaluation on frozen features: its device, images and backbones, and the record of it."""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.backbone import RANDOM
from convert.errors import UserError
from pretrain import distributed
from pretrain.config import as_dict, load_config
from pretrain.sources import ImageList
from transfer.classification.features import (
    Features,
    FrozenNetwork,
    all_features,
    open_backbone,
    pick_device,
)
from transfer.classification.request import (
    ProbeConfig,
    Request,
    checkpoint_identity,
    claim_folder,
)
from transfer.classification.sets import open_sets
from transfer.classification.shifted import Shifted, describe, open_shifted
from transfer.results import name_recipe, write_results


class Probe:
    """What every evaluation on frozen features does before and after its own part.

    Args:
        task: `linear`, `knn`.
        config: image size, stage, seeds.
        request: checkpoint, images, folders.
        protocol: says of a config everything that changes the number, apart from checkpoint, data
            and seed.
        tagged: whether the protocol takes images with several classes.

    Raises:
        UserError: device, images or checkpoint are not there or unfit.
    """

    def __init__(
        self,
        task: str,
        config: ProbeConfig,
        request: Request,
        protocol: Callable[[Any], Mapping[str, Any]],
        *,
        tagged: bool = False,
    ) -> None:
        self.started = time.time()
        self.task, self.config, self.request = task, config, request
        self.protocol = protocol(config)
        own = load_config(type(config), request.recipe)
        self.recipe = name_recipe(request.recipe_name(task), protocol(own), self.protocol)
        self.device = pick_device(request.device)
        self.sets = open_sets(request.folder, tagged=tagged)
        self.data = self.sets.as_dict()
        self.num_classes = len(self.sets.train.classes)
        if self.num_classes < 2:
            raise UserError(
                f"images {self.data['name']}: has one class, '{self.sets.train.classes[0]}'; want "
                "two or more to tell apart"
            )
        self.shifted = open_shifted(request.also_test, self.sets.train.classes)
        self.backbone = open_backbone(request, config.seed)
        self.checkpoint = json.loads(json.dumps(self.backbone.facts.as_dict()))

    def identity(self, seed: int | None = None) -> dict[str, Any]:
        """Say in one flat mapping what makes a run, or one seed of it, the same as another."""
        return {
            **self.protocol,
            **checkpoint_identity(self.checkpoint),
            "train": self.data["train"]["listing"],
            "val": self.data["val"]["listing"],
            "seed": self.config.seed if seed is None else seed,
            **({"seeds": self.config.seeds} if seed is None else {}),
        }

    def finished(
        self, may_change: Collection[str] = (), *, from_file: bool = False
    ) -> dict[str, Any] | None:
        """Return the record of this very run, if the output folder holds it and may be resumed.

        Args:
            may_change: keys that a resumed run may have other values of.
            from_file: whether a run goes on from any file that --resume names.

        Raises:
            UserError: the folder cannot be written, or holds another run.
        """
        if not from_file and self.request.resume not in (None, "auto"):
            raise UserError("--resume FILE: name the run by --output-dir, and use --resume alone")
        done = claim_folder(self.request, self.identity(), may_change)
        say, facts, data = self.request.say, self.backbone.facts, self.data
        images = f"{data['train']['images']} train and {data['val']['images']} val images"
        say(f"{self.task}: {facts.name} ({facts.method}), {self.device}")
        say(f"on {data['name']}: {images}, {self.num_classes} classes")
        say(f"output: {self.request.output_dir}{'' if done is None else ', already done'}")
        return done

    def network(self, seed: int, beside: Sequence[str] = ()) -> FrozenNetwork:
        """Return the frozen backbone; random initialisation is drawn anew from each seed.

        Args:
            seed: of the repetition.
            beside: more places than the config's stage where features are taken.
        """
        anew = self.request.pretrained == RANDOM and seed != self.config.seed
        backbone = open_backbone(self.request, seed) if anew else self.backbone
        config = self.config
        return FrozenNetwork(backbone, config.stage, self.device, beside, config.precision)

    def features_of(
        self, network: FrozenNetwork, images: ImageList, what: str
    ) -> dict[str, Features]:
        """Return the features of any images' test views at every source of the network."""
        return all_features(network, images, self.config, self.request, what)

    def all_train_features(self, network: FrozenNetwork) -> dict[str, Features]:
        """Return the features of the training images' test views at every source."""
        return self.features_of(network, self.sets.train, "train")

    def all_val_features(self, network: FrozenNetwork) -> dict[str, Features]:
        """Return the features of the validation images' test views at every source."""
        return self.features_of(network, self.sets.val, "val")

    def shifted_features(
        self, network: FrozenNetwork
    ) -> Iterator[tuple[Shifted, dict[str, Features]]]:
        """Yield each shifted set with its features at every source."""
        for part in self.shifted:
            what = part.name if part.corruption is None else f"{part.name} {part.corruption}"
            resize = self.config.image_size if part.ready else None
            args = (network, part.images, self.config, self.request, what, resize)
            yield part, all_features(*args)

    def train_features(self, network: FrozenNetwork) -> Features:
        """Return the features of the training images' test views."""
        return self.all_train_features(network)[network.stage]

    def val_features(self, network: FrozenNetwork) -> Features:
        """Return the features of the validation images' test views."""
        return self.all_val_features(network)[network.stage]

    def measure(
        self, one_seed: Callable[[int, Features, Features], Mapping[str, float]]
    ) -> dict[str, Any]:
        """Measure each seed's frozen features and write `results.json`.

        Several processes compute features together; the first one does the rest alone.

        Args:
            one_seed: (seed, training features, validation features) -> its metrics.

        Returns:
            The record; empty on other processes than the first.
        """
        features = []
        for seed in self.config.all_seeds:
            network = self.network(seed)
            features.append((seed, self.train_features(network), self.val_features(network)))
            network.prove_unmoved()
        if distributed.rank() > 0:
            return {}
        return self.write([one_seed(*found) for found in features], self.request.output_dir)

    def write(self, per_seed: Sequence[Mapping[str, float]], folder: Path) -> dict[str, Any]:
        """Write `results.json` into a folder and return it."""
        return write_results(
            folder,
            keep=distributed.rank() == 0,
            task=self.task,
            per_seed=per_seed,
            protocol=self.protocol,
            recipe=self.recipe,
            config=as_dict(self.config)
            | {"device": str(self.device), "processes": distributed.size()},
            checkpoint=self.checkpoint,
            data=self.data | ({"also_test": describe(self.shifted)} if self.shifted else {}),
            started=self.started,
        )
