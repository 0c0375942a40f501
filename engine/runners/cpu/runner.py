"""The runner of the compiled kernels, for decoders on the CPU.

A decode step, which is a few tokens of any sequences, is one compiled function. A chunk of a prompt runs in torch.
Weights, keys and values stay in their own dtype, such as bfloat16 or int8. The arithmetic is float32, but on CPUs
that multiply bfloat16, both factors of a chunk's products are rounded to it (`precision`).

Shape suffixes: N tokens of a chunk, E hidden size, H query heads, K key-value heads, M keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path as Folder
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ....errors import RopewalkWarning, UnsupportedModel, warn
from ....scaling.rope import Scaler
from ...attention.kernel import AttentionScore
from ...attention.rows import KeyRun
from ...hf_model import dtype_name
from ...kv_cache import KVCache, addresses_of
from ...packed import PackedWeight
from ...patches.float32 import exact_products, float32_arithmetic
from ...patches.probe import logits, probe_ids
from ...rotary_site import RotarySite
from ..chunk_attention import Attend, ChunkAttention
from ..decoder_runner import DecoderRunner, Rows, Tree
from ..family import decoder
from .bfloat16_attention import BFloat16Attention
from .chunk import DecoderLayers
from .kernels import HAS_BFLOAT16_PRODUCTS, UNAVAILABLE
from .tables import StoredLinear, Tables, cache_kernels
from .threads import share_threads

_MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.int8: 5e-2}
"""Of logits, by the dtype of keys and values: Euclidean norm, relative. Rounding to bfloat16 changes a number by up to
0.002 of itself; the logits of Gemma 3 270M differ by 0.0024 with it, by 0.028 with int8, and by 2e-6 with neither."""

_MAX_DIFFERENCE_OF_BLOCKS = 2e-3  # by vectors rounded to 16 bits

_MAX_DIFFERENCE_OF_PRODUCTS = 0.1  # by products in bfloat16; in small random models of all families at most 0.04


class CompiledRunner(DecoderRunner):
    """Runs a decoder of one of the families in `family.py` on the CPU.

    Raises:
        UnsupportedModel: no family describes the model, or the kernels do not reproduce its logits.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        sites: list[RotarySite],
        weights: str = "own",
        cache: str = "auto",
        folder: Folder | None = None,
        precision: str = "auto",
    ) -> None:
        if UNAVAILABLE:
            raise UnsupportedModel(UNAVAILABLE)
        places = sorted({weight.device.type for weight in hf.parameters()} - {"cpu"})
        if "meta" in places:
            raise UnsupportedModel("compiled kernels need all weights in memory, and some are offloaded")
        if places or hf.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedModel(
                f"compiled kernels run on the CPU in float32 or bfloat16, not {', '.join(places) or hf.dtype}"
            )
        described = decoder(hf)
        is_packed = any(isinstance(linear.weight, PackedWeight) for linear in described.linears)
        is_rounded = weights == "int8" or is_packed
        dtype = hf.dtype
        if cache != "auto":
            dtype = getattr(torch, cache)
        elif is_rounded:
            dtype = torch.bfloat16
        super().__init__(hf, sites, described, dtype, folder)
        rounds = 2 if precision == "float32" else 1
        self._rounds_vectors = is_packed and rounds == 1
        if precision == "auto":
            narrow = HAS_BFLOAT16_PRODUCTS and (is_rounded or hf.dtype == torch.bfloat16)
            precision = "bfloat16" if narrow else "float32"
        self._products = getattr(torch, precision)
        self._tables = Tables.of(self._decoder, self._groups, rounds=rounds)
        self._layers = DecoderLayers(self._decoder, self._tables)
        self.use(Scaler(), None)
        self._verify_chunk()  # before weights are rounded
        if weights == "int8":
            self._tables = Tables.of(self._decoder, self._groups, StoredLinear.rounded_to_int8)
            self._layers = DecoderLayers(self._decoder, self._tables)
        self._verify_step()

    @property
    def precision(self) -> str:
        weights, cache, products = self.weights, dtype_name(self._dtype), dtype_name(self._products)
        if weights == cache == products == "float32":
            return weights
        steps = ", 16-bit vectors in steps" if self._rounds_vectors else ""
        arithmetic = "float32 arithmetic" if products == "float32" and not steps else f"{products} prefill"
        return f"{weights}, {cache} cache, {arithmetic}{steps}"

    @property
    def how(self) -> str:
        """A short description of the runner."""
        import numba

        from .kernels.flash import uses_amx

        with_amx = " (attention by AMX)" if uses_amx(self._decoder.head_dim) else ""
        return (
            f"compiled steps (numba {numba.__version__}, {numba.get_num_threads()} threads), chunks in torch; weights "
            f"in {self.weights}, cache in {dtype_name(self._dtype)}, arithmetic in float32"
            + (f", but products of chunks in bfloat16{with_amx}" if self._products == torch.bfloat16 else "")
            + (", vectors of steps rounded to 16 bits" if self._rounds_vectors else "")
        )

    @property
    def weights(self) -> str:
        return " + ".join(self._tables.formats)

    def _verify_chunk(self) -> None:
        """Refuse a model whose logits after a chunk, which is not compiled, are not those of its own modules.

        Both in float32 arithmetic, with keys and values in float32.
        """
        ids = probe_ids(self.hf)[0].tolist()
        dtype, self._dtype = self._dtype, torch.float32
        with torch.inference_mode(), float32_arithmetic(self.hf):
            expected = logits(self.hf)[0]
            chunk = self._prefill_chunk(ids, self.new_cache(len(ids)), len(ids), torch.float32)
            self._check(chunk, expected, _MAX_DIFFERENCE[torch.float32])
        self._dtype = dtype

    def _verify_step(self) -> None:
        """Refuse a model whose logits after a compiled step, or a chunk in bfloat16, are not those of the exact chunk.

        With weights, keys and values in the dtypes that they will have: the step is compiled for no others.
        """
        ids = probe_ids(self.hf)[0].tolist()
        with torch.inference_mode():
            with exact_products():
                expected = self._prefill_chunk(ids, self.new_cache(len(ids)), len(ids), torch.float32)
            step = self._decode_step([(ids, self.new_cache(len(ids)))], len(ids))
            largest = _MAX_DIFFERENCE[self._dtype]
            if self._rounds_vectors:
                largest = max(largest, _MAX_DIFFERENCE_OF_BLOCKS)
            self._check(step, expected, largest)
            if self._products == torch.bfloat16:
                chunk = self._prefill_chunk(ids, self.new_cache(len(ids)), len(ids))
                self._check(chunk, expected, _MAX_DIFFERENCE_OF_PRODUCTS)

    # decode steps

    def _decode_step(self, rows: Rows, logits_to_keep: int, tree: Tree | None = None) -> Tensor:
        threads = share_threads()
        from .kernels import step
        from .kernels.step import SHIFT

        ids = [token for tokens, _ in rows for token in tokens]
        if min(ids) < 0 or max(ids) >= self.vocabulary_size:
            self.check(ids)  # raises
        x = self._decoder.embedding(torch.tensor(ids)).float().numpy()
        places = np.array([cache.length + k for tokens, cache in rows for k in range(len(tokens))], np.int64)
        buffers = self._buffer_addresses(rows)
        length, ancestors = tree or (0, None)
        positions = places
        if ancestors is not None:
            positions = np.array([length + len(path) - 1 for path in ancestors], np.int64)
        parts, firsts = self._key_parts(positions, length, ancestors)
        tables = self._tables
        logits = np.empty((logits_to_keep, self._decoder.head.weight.shape[0]), np.float32)
        arguments = (
            tables.shape,
            tables.numbers,
            cache_kernels(self._dtype, bool(parts[:, SHIFT].any())),
            tables.linears,
            tables.norms,
            np.array(self._rotation_of, np.int64),
            x,
            self._angles(positions),
            parts,
            firsts,
            np.stack([rotation.scales(positions, self._decoder.layers[0].scale) for rotation in self._rotations]),
            places,
            buffers,
            tables.head,
            logits,
        )
        if not step(*arguments, threads):
            warn(
                RopewalkWarning(
                    f"the {threads} threads of a step did not start together, so it runs on one; give this process as "
                    f"many cores as threads, or fewer threads by torch.set_num_threads"
                )
            )
            step(*arguments, 1)
        for tokens, cache in rows:
            cache.advance(len(tokens))
        result = torch.from_numpy(logits)
        return result if self._decoder.softcap is None else self._decoder.capped(result)

    def _angles(self, positions: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        """Cosines and sines for the queries, [groups, bands, n, 2, half], and for the keys, [groups, n, 2, half].

        Groups with fewer bands are padded. The kernels do not read the padding.
        """
        tables = [rotation.angles(positions, self._tables.half) for rotation in self._rotations]
        bands = max(len(queries) for queries, _ in tables)
        padded = [np.resize(queries, (bands, *queries.shape[1:])) for queries, _ in tables]
        return np.stack(padded), np.stack([keys for _, keys in tables])

    def _key_parts(
        self, positions: np.ndarray[Any, Any], length: int, ancestors: list[list[int]] | None
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The keys that every token sees, cut into the parts that threads compute.

        Args:
            length, ancestors: of a `Tree`. Each ancestor is a part of one key.

        Returns:
            Parts, int64 [parts, 5], and the index of each token's first part, int64 [groups, n + 1], as `step` takes
            them.
        """
        from .kernels.attention import PART

        parts: list[tuple[int, int, int, int, int]] = []
        firsts: list[int] = []
        for rotation in self._rotations:
            shifts = [rotation.shifts(band, int(positions.max()) + 1) for band in range(len(rotation.bands))]
            for token, position in enumerate(positions.tolist()):
                firsts.append(len(parts))
                for band, start, count in rotation.visible(position):
                    stop, table = start + count, shifts[band]
                    address, row = (0, 0) if table is None else (table.ctypes.data, table.strides[0])
                    if ancestors is not None:
                        inside = range(max(start, length), max(stop, length))
                        parts += [
                            (token, band, ancestors[token][key - length], 1, address + key * row) for key in inside
                        ]
                        stop = min(stop, length)
                    parts += [
                        (token, band, key, min(PART, stop - key), address + key * row)
                        for key in range(start, stop, PART)
                    ]
            firsts.append(len(parts))
        return np.array(parts, np.int64), np.array(firsts, np.int64).reshape(len(self._rotations), -1)

    def _buffer_addresses(self, rows: Rows) -> np.ndarray[Any, Any]:
        """The `addresses_of` every token's cache, with room for the tokens."""
        for ids, cache in rows:
            cache.reserve(len(ids))
        return addresses_of([cache for ids, cache in rows for _ in ids])

    # chunks

    def _prefill_chunk(
        self, ids: Sequence[int], cache: KVCache, logits_to_keep: int, products: torch.dtype | None = None
    ) -> Tensor:
        self.check(ids)
        products = products or self._products
        start, count = cache.length, len(ids)
        run = KeyRun(None, 0, count, 0, start + count, 0)
        attention = BFloat16Attention if products == torch.bfloat16 else ChunkAttention
        chunks = [attention(rotation, run) for rotation in self._rotations]

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor, score: AttentionScore) -> Tensor:
            return chunks[self._rotation_of[index]].attend(q, k, v, cache.layers[index], score)

        return self._run_chunk(ids, attend, logits_to_keep, products)

    def _run_chunk(
        self, ids: Sequence[int], attend: Attend, logits_to_keep: int, products: torch.dtype | None = None
    ) -> Tensor:
        hidden = self._layers.run(ids, attend, products or self._products)
        return self._layers.logits(hidden[-logits_to_keep:])
