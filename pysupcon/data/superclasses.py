"""Superclasses (coarse classes) of each data set, and coarse labels from fine ones."""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = {"below five": ["0", "1", "2", "3", "4"], "five and above": ["5", "6", "7", "8", "9"]}

#: Clothing against shoes and bags. Fashion-MNIST has no official superclasses; these have six and four
#: classes, like those of CIFAR-10.
FASHION = {
    "clothing": ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Shirt"],
    "shoes and bags": ["Sandal", "Sneaker", "Bag", "Ankle boot"],
}

CIFAR10 = {
    "animal": ["bird", "cat", "deer", "dog", "frog", "horse"],
    "vehicle": ["airplane", "automobile", "ship", "truck"],
}

#: Classes of CIFAR-2, a subset of CIFAR-10 (SINCERE, arXiv 2309.14277).
CIFAR2 = ["cat", "dog"]

CIFAR100 = {
    "aquatic_mammals": ["beaver", "dolphin", "otter", "seal", "whale"],
    "fish": ["aquarium_fish", "flatfish", "ray", "shark", "trout"],
    "flowers": ["orchid", "poppy", "rose", "sunflower", "tulip"],
    "food_containers": ["bottle", "bowl", "can", "cup", "plate"],
    "fruit_and_vegetables": ["apple", "mushroom", "orange", "pear", "sweet_pepper"],
    "household_electrical_devices": ["clock", "keyboard", "lamp", "telephone", "television"],
    "household_furniture": ["bed", "chair", "couch", "table", "wardrobe"],
    "insects": ["bee", "beetle", "butterfly", "caterpillar", "cockroach"],
    "large_carnivores": ["bear", "leopard", "lion", "tiger", "wolf"],
    "large_man-made_outdoor_things": ["bridge", "castle", "house", "road", "skyscraper"],
    "large_natural_outdoor_scenes": ["cloud", "forest", "mountain", "plain", "sea"],
    "large_omnivores_and_herbivores": ["camel", "cattle", "chimpanzee", "elephant", "kangaroo"],
    "medium_mammals": ["fox", "porcupine", "possum", "raccoon", "skunk"],
    "non-insect_invertebrates": ["crab", "lobster", "snail", "spider", "worm"],
    "people": ["baby", "boy", "girl", "man", "woman"],
    "reptiles": ["crocodile", "dinosaur", "lizard", "snake", "turtle"],
    "small_mammals": ["hamster", "mouse", "rabbit", "shrew", "squirrel"],
    "trees": ["maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"],
    "vehicles_1": ["bicycle", "bus", "motorcycle", "pickup_truck", "train"],
    "vehicles_2": ["lawn_mower", "rocket", "streetcar", "tank", "tractor"],
}


def coarse_labels_of(fine: Tensor, fine_names: list[str], superclasses: dict[str, list[str]]) -> Tensor:
    """Coarse label of every sample.

    Args:
        fine: fine labels, int64 [N], indices into ``fine_names``.
        fine_names: names of the fine classes.
        superclasses: maps each coarse class name to its fine class names; every fine class occurs once.

    Returns:
        int64 [N], indices into ``list(superclasses)``.
    """
    coarse_of = {name: index for index, names in enumerate(superclasses.values()) for name in names}
    table = torch.tensor([coarse_of[name] for name in fine_names], dtype=torch.int64)
    return table[fine]
