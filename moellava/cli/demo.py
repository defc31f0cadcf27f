# Copyright 2026 The MoELLaVA authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`moellava demo`: a small model from its parts to its answers, in a minute or two."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Debug


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("moellava-demo"),
    epochs: Annotated[
        float | None, typer.Option(help="Rounds of training. By default as many as it takes.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Assemble, train and ask a small model, dense and sparse, in a minute or two.

    Nothing is downloaded: the parts are made here, and the pictures are scans of digits that come with scikit-learn.
    A second run replaces what the first has written; what it has not written, or what was changed since, is in its way
    and stays. Ends with exit code 1 where the model does not see as well as it should. Needs the extra `demo`:
    `pip install 'moellava[demo]'`.

    Examples:

    ```
    moellava demo
    moellava demo --out build/demo
    ```
    """
    from ..demo.running import EPOCHS, run_demo

    if not run_demo(out, EPOCHS if epochs is None else epochs):
        raise typer.Exit(1)


__all__ = ["demo"]
