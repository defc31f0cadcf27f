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
"""`moellava space`: a Hugging Face Space to try a checkpoint in."""

from typing import Annotated

import typer

from .options import Checkpoint, Debug, Hub, Json, OutFolder
from .printing import print_json


def space(
    checkpoint: Checkpoint,
    out: OutFolder,
    *,
    repo_id: Annotated[
        str | None,
        typer.Option(
            help="The Hub id that the Space loads. By default CHECKPOINT; a folder is there on this machine only.",
            show_default=False,
        ),
    ] = None,
    hub: Hub,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a Hugging Face Space for a checkpoint: its page, what it needs, and what it is.

    The folder can be pushed to a Space as it is; `python app.py` in it serves the page on this machine.

    Examples:

    ```
    moellava space me/my-model my-space
    moellava space my-model my-space --repo-id me/my-model
    ```
    """
    from ..hub_cards import render_space

    files = [str(path) for path in render_space(checkpoint, out, repo_id=repo_id, **hub.options())]
    if as_json:
        print_json({"files": files})
    else:
        typer.echo("\n".join(files))


__all__ = ["space"]
