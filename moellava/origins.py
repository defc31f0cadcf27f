# SPDX-License-Identifier: Apache-2.0
"""The import path of earlier versions: `from moellava.origins import with_training`."""

from .reading.provenance import with_training


__all__ = ["with_training"]
