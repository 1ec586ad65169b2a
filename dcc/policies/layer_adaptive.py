"""Layer-adaptive policies: each block or branch is computed or forecast by its own rule."""

from __future__ import annotations
