# SPDX-License-Identifier: Apache-2.0
"""Datasets that hand out what their pictures' files hold: they are decoded here, where they are used."""

import dataclasses
from typing import Any


def undecoded(source: Any) -> Any:
    """Makes a dataset of `datasets` hand out its pictures, and whatever else it would decode, as bytes and path.

    The library decodes every column of a row that is read, pictures by Pillow in any format that it knows.

    Args:
        source: A dataset, which may be streamed; rows of another kind are returned as they are.
    """
    features = getattr(source, "features", None)
    if not features or not hasattr(source, "cast_column"):
        return source
    for name, feature in dict(features).items():
        if (plain := _plain(feature)) != feature:
            source = source.cast_column(name, plain)
    return source


def _plain(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _plain(held) for name, held in feature.items()}
    if isinstance(feature, list):
        return [_plain(held) for held in feature]
    if getattr(feature, "decode", False) is True:
        return dataclasses.replace(feature, decode=False)
    if hasattr(feature, "feature"):  # a list of something
        return dataclasses.replace(feature, feature=_plain(feature.feature))
    return feature


__all__ = ["undecoded"]
