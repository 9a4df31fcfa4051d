"""All studies, in the order of the page and of the trainings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.papers import kl_bound, repulsion, threshold, transfer, worst_group
from benchmarks.papers.methods import (
    FASHION_ROOT,
    FASHION_SOURCE,
    LETTERS,
    PAIR,
    STRONG,
    WIDTHS,
    Method,
    Table,
    transfer_methods,
)
from benchmarks.papers.study import Study
from benchmarks.papers.table_study import Order, TableStudy

_THANOS, _PAIR = "thanos_frozen", "ce_autoencoder_pair"

ORDERS = (
    Order(
        "SupCon + cNCE above SupCon, both at tau 0.5", "supcon_cnce", "supcon", "logistic", source="Thanos"
    ),
    Order("SupCon + cNCE above SupCon, both at tau 0.5", "supcon_cnce", "supcon", "knn", source="Thanos"),
    Order(
        "SupCon + cNCE, alpha 0.12, above SupCon, both at tau 0.5", "supcon_cnce_low", "supcon", "logistic"
    ),
    Order("SupCon + cNCE, alpha 0.5 above alpha 0.12", "supcon_cnce", "supcon_cnce_low", "logistic"),
    Order("SupCon + cNCE above cross-entropy", "supcon_cnce", "ce", "logistic"),
    Order("SupCon + cNCE above cross-entropy", "supcon_cnce", "ce", "knn"),
    Order("Thanos above SupCon, both at tau 0.5", _THANOS, "supcon", "logistic", source="Thanos"),
    Order("Thanos above SupCon, both at tau 0.5", _THANOS, "supcon", "knn", source="Thanos"),
    Order("Thanos above SupCon + cNCE", _THANOS, "supcon_cnce", "logistic", source="Thanos"),
    Order("Thanos above cross-entropy + autoencoder", _THANOS, "ce_autoencoder", "logistic", source="Thanos"),
    Order("Thanos above cross-entropy + autoencoder", _THANOS, "ce_autoencoder", "knn", source="Thanos"),
    Order("Thanos above two cross-entropy + autoencoder, of equal width", _THANOS, _PAIR, "logistic"),
    Order("Thanos above two cross-entropy + autoencoder, of equal width", _THANOS, _PAIR, "knn"),
    Order("Thanos above two SupCon + cNCE, of equal width", _THANOS, "supcon_cnce_pair", "logistic"),
    Order("Thanos above two SupCon + cNCE, of equal width", _THANOS, "supcon_cnce_pair", "knn"),
    Order("Thanos above the pixels", _THANOS, "pixels", "logistic"),
    Order("Thanos above the pixels", _THANOS, "pixels", "knn"),
    Order("SINCERE above SupCon, both at tau 0.5", "sincere", "supcon", "logistic"),
    Order("SINCERE above SupCon, both at tau 0.1", "sincere_cold", "supcon_cold", "logistic"),
    Order("SupCon + cNCE above SupCon, both at tau 0.1", "supcon_cnce_cold", "supcon_cold", "logistic"),
    Order("SupCon + cNCE above SupCon, both at tau 0.1", "supcon_cnce_cold", "supcon_cold", "knn"),
    Order("SupCon + cNCE at tau 0.5 above SupCon at tau 0.1", "supcon_cnce", "supcon_cold", "logistic"),
    Order("Thanos above SupCon, both at tau 0.1", "thanos_cold", "supcon_cold", "logistic"),
    Order(
        "Thanos at tau 0.1 above two cross-entropy + autoencoder, of equal width",
        "thanos_cold",
        _PAIR,
        "logistic",
    ),
    Order(
        "Thanos at tau 0.1 above two cross-entropy + autoencoder, of equal width", "thanos_cold", _PAIR, "knn"
    ),
    Order("SupCon above an untrained network", "supcon", "untrained", "logistic"),
)
"""Claims of the coarse-to-fine tables; a table decides those whose rows it has."""


def _study(table: Table, more: tuple[Order, ...] = (), **options: Any) -> TableStudy:
    """The study of a coarse-to-fine table."""
    rows = {method.key for method in table.methods}
    return TableStudy(
        table, [order for order in (*ORDERS, *more) if {order.row, order.less} <= rows], **options
    )


HEADLINES = (
    ("supcon_cnce", "supcon", "logistic"),
    ("supcon_cnce_cold", "supcon_cold", "logistic"),
    (_THANOS, "supcon", "logistic"),
    (_THANOS, _PAIR, "logistic"),
)
"""Claims that stand in README, for the first table."""

_MECHANISMS = (
    Method("infonce", "InfoNCE"),
    Method("supcon_cnce_permuted", "control: SupCon + cNCE, views re-paired within the class"),
    Method("supcon_cnce_spectral", "SupCon + cNCE, bounded Lipschitz constant", also=("lipschitz",)),
    Method("supcon_autoencoder", "SupCon + autoencoder"),
    Method("thanos_one", "Thanos, one backbone"),
    Method("thanos", "Thanos, two backbones trained together"),
)
"""Further methods, compared once."""

MECHANISM_ORDERS = (
    Order("Pairing an image with itself is needed: SupCon + cNCE above its re-paired control",
          "supcon_cnce", "supcon_cnce_permuted", "logistic", source="Thanos"),
    Order("Pairing an image with itself is needed: SupCon + cNCE above its re-paired control",
          "supcon_cnce", "supcon_cnce_permuted", "knn", source="Thanos"),
    Order("The bound lowers the Lipschitz constant of SupCon + cNCE", "supcon_cnce", "supcon_cnce_spectral",
          "lipschitz"),
    Order("A bounded Lipschitz constant helps SupCon + cNCE", "supcon_cnce_spectral", "supcon_cnce",
          "logistic", source="Thanos"),
    Order("A bounded Lipschitz constant helps SupCon + cNCE", "supcon_cnce_spectral", "supcon_cnce", "knn",
          source="Thanos"),
    Order("The autoencoder helps SupCon", "supcon_autoencoder", "supcon", "logistic", source="Thanos"),
    Order("Thanos on one backbone above SupCon + cNCE", "thanos_one", "supcon_cnce", "logistic",
          source="Thanos"),
)  # fmt: skip
"""What breaks the invariance under permutations within a class, one by one."""

MNIST_STRONG = _study(
    Table("mnist5k_strong", "MNIST-coarse, 3,600 images, strong augmentation", "mnist5k_coarse",
          transfer_methods(widths=WIDTHS, low_alpha=True, full_probe=True),
          arguments=STRONG, minutes=0.3),
    in_quick=True, headlines=HEADLINES,
)  # fmt: skip
MNIST_NONE = _study(
    Table("mnist5k_none", "MNIST-coarse, 3,600 images, no augmentation", "mnist5k_coarse",
          tuple(
              replace(method, also=(*method.also, "lipschitz")) if method.key == "supcon_cnce" else method
              for method in transfer_methods(_MECHANISMS, WIDTHS, low_alpha=True, full_probe=True)
          ), minutes=0.33),
    MECHANISM_ORDERS,
)  # fmt: skip
FASHION_NONE = _study(
    Table("fashion_mnist_none", "Fashion-MNIST-coarse, 5,000 images, no augmentation",
          "fashion_mnist_coarse", transfer_methods(widths=PAIR), root=FASHION_ROOT, source=FASHION_SOURCE,
          minutes=0.3),
)  # fmt: skip

_HEAD = ("--model.projection", "mlp")
_TAU = ("--loss.temperature", "0.05")
MARGINS = TableStudy(
    Table(
        "mnist5k_fine", "Margins, trained on the ten digits, strong augmentation", "mnist5k_fine",
        (
            Method("supcon_head", "SupCon, temperature 0.1, MLP head", "supcon", _HEAD, quick=True),
            Method("supcon_head_05", "SupCon, temperature 0.05, MLP head", "supcon", (*_HEAD, *_TAU)),
            Method("sincere_head", "SINCERE, temperature 0.1, MLP head", "sincere", _HEAD, quick=True),
        ),
        baseline="supcon_head",
        figures=("knn", "margin", "bound", "head_margin", "head_bound"),
        compared=("head_margin", "margin", "knn"),
        minutes=0.4,
    ),
    (
        Order("SINCERE's margin above SupCon's at the same temperature", "sincere_head", "supcon_head",
              "head_margin", headline=True, source="SINCERE"),
        Order("SINCERE's margin above SupCon's at the paper's temperatures (0.1, 0.05)", "sincere_head",
              "supcon_head_05", "head_margin", source="SINCERE"),
        Order("SINCERE's margin above SupCon's at the same temperature", "sincere_head", "supcon_head",
              "margin", source="SINCERE"),
        Order("SINCERE above SupCon at the same temperature", "sincere_head", "supcon_head", "knn",
              source="SINCERE"),
        Order("SINCERE's bound above SupCon's at the same temperature", "sincere_head", "supcon_head",
              "head_bound", source="SINCERE"),
    ),
    in_quick=True,
)  # fmt: skip
MOCO = TableStudy(
    Table(
        "mnist5k_moco", "Labelled MoCo: momentum encoder, ten digits, batches of 50", "../mnist5k",
        (
            Method("moco_0", "SupCon, no queue", "moco", ("--loss.queue", "0")),
            Method("moco", "SupCon, queue of 2,048 keys"),
        ),
        baseline="moco_0", figures=("logistic", "knn", "spread"), minutes=0.26,
    ),
    (
        Order("The queue helps", "moco", "moco_0", "logistic"),
        Order("The queue helps", "moco", "moco_0", "knn"),
    ),
)  # fmt: skip

GLYPHS = _study(
    Table("glyphs", "Glyphs: trained on letters, evaluated on letter and typeface, no augmentation",
          "glyphs_coarse", transfer_methods(widths=PAIR), minutes=0.35),
)  # fmt: skip
LETTER_VECTORS = _study(
    Table("letters", "Letter recognition: vectors, trained on halves of the alphabet", "letters_coarse",
          transfer_methods(widths=PAIR), root=str(LETTERS), minutes=0.08,
          source="see the section More data of benchmarks/papers/README.md"),
)  # fmt: skip
_LEFT_OUT = ("ce", "sincere", "sincere_cold")
FASHION_FULL = _study(
    Table("fashion_mnist_full", "Fashion-MNIST-coarse, all 60,000 images at 28 pixels, no augmentation",
          "fashion_mnist_full_coarse",
          tuple(method for method in transfer_methods(widths=PAIR) if method.key not in _LEFT_OUT),
          root=FASHION_ROOT, source=FASHION_SOURCE, minutes=0.9),
)  # fmt: skip

STUDIES: tuple[Study, ...] = (
    MNIST_STRONG, MNIST_NONE, FASHION_NONE, FASHION_FULL, GLYPHS, LETTER_VECTORS, threshold,
    MARGINS, repulsion, kl_bound, transfer, worst_group, MOCO,
)  # fmt: skip
