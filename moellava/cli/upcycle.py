# SPDX-License-Identifier: Apache-2.0
"""`moellava upcycle`: a sparse mixture of experts of a dense checkpoint."""

import re
from pathlib import Path
from typing import Annotated

import typer

from .inputs import check_is_checkpoint, import_parts
from .logs import debug_options, logging_shown
from .options import (
    Debug,
    DType,
    DTypeOption,
    Imports,
    Json,
    MoeField,
    OutFolder,
    Saving,
    TrustedHub,
    Verbose,
    completes,
    named_values,
)
from .printing import print_json, print_summary


_INDICES = re.compile(r" *[0-9]+ *(, *[0-9]+ *)*")


def upcycle(
    dense: Annotated[
        str, typer.Argument(help="A dense checkpoint: a folder or a Hub id.", metavar="DENSE", show_default=False)
    ],
    out: OutFolder,
    *,
    num_experts: Annotated[int, typer.Option(min=1, help="The number of experts of a sparse layer.")] = 4,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="The number of experts that a token goes to.")] = 2,
    layers: Annotated[
        str,
        typer.Option(
            help="first_half, second_half, sparse (every other), dense (all), or indices such as 0,2,4.",
            autocompletion=completes("dense", "first_half", "second_half", "sparse"),
        ),
    ] = "sparse",
    router: Annotated[
        Path | None,
        typer.Option(help="A router's file, put into every sparse layer (Med-MoE).", show_default=False),
    ] = None,
    moe_field: MoeField = None,
    imports: Imports = None,
    dtype: DTypeOption = DType.AUTO,
    saving: Saving,
    hub: TrustedHub,
    as_json: Json = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a sparse mixture of experts of a dense checkpoint.

    Every expert starts as a copy of the layer's MLP, so that the new model says what the dense one said until it is
    trained on.

    Examples:

    ```
    moellava upcycle my-model my-sparse-model --num-experts 4 --top-k 2 --layers sparse
    moellava upcycle my-model my-sparse-model --layers 0,2,4 --moe-field use_residual=true
    ```
    """
    saving.check(out)
    moe_config = {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "layers": [int(index) for index in layers.split(",")] if _INDICES.fullmatch(layers) else layers,
        **({} if router is None else {"router_path": router}),
        **named_values(moe_field, "--moe-field"),
    }
    import_parts(imports)
    fields = check_is_checkpoint(dense, hub)
    from ..building.dense_to_sparse import check_is_dense
    from ..inspecting import inspect_checkpoint
    from ..loading import load_pretrained_model

    check_is_dense(fields.get("moe_config"))

    options = {"device": "cpu", "dtype": dtype.given(), **debug_options(verbose), **hub.options()}
    with logging_shown(verbose, hide_load_report=True):
        model = load_pretrained_model(dense, moe_config=moe_config, **options).model
        model.save_pretrained(out, **saving.options())
    summary = inspect_checkpoint(out)
    if as_json:
        print_json(summary.to_dict())
    else:
        print_summary(summary)


__all__ = ["upcycle"]
