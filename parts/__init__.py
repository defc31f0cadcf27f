# SPDX-License-Identifier: Apache-2.0
"""What a model may be made of: encoders, projectors, sparse layers; a checkpoint carries those that it uses."""

import transformers.models.auto.modeling_auto  # first: our models enter themselves there, and import all of these files
