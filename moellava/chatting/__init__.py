# SPDX-License-Identifier: Apache-2.0
"""Conversations: what rows of data and chat templates say, the prompts of a model, and talking to one."""

from .chat import Chat


__all__ = ["Chat"]
