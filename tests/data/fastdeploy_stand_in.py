"""A stand-in for FastDeploy's compiled operators and backends: its names and signatures, computed in loops.

Nothing of it is FastDeploy's. `operators` makes functions with the signatures of a version; the bodies below
get their arguments by the names that the C++ functions give them.
"""

import inspect
import os

CALLS = []


def view(tensor):
    """A torch view of a Paddle tensor: what is written to it is written there."""
    import paddle
    from torch.utils.dlpack import from_dlpack

    found = from_dlpack(paddle.to_dlpack(tensor))
    assert found.is_contiguous(), "the kernels take dense tensors alone"
    return found


def given_back(*tensors):
    import paddle
    from torch.utils.dlpack import to_dlpack

    return [paddle.from_dlpack(to_dlpack(tensor)) for tensor in tensors]


def rows_of(given):
    """Lengths of every slot: encoder, decoder, new."""
    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
    lengths = [view(given[name]) for name in names]
    assert all(str(one.dtype) == "torch.int32" and one.dim() == 1 for one in lengths)
    return list(zip(*(one.tolist() for one in lengths), strict=True))


# ---- metadata ------------------------------------------------------------------------------------


def get_position_ids_and_mask_encoder_batch(given):
    positions = view(given["position_ids"])
    assert str(positions.dtype) == "torch.int32"
    mask = None if "mask_encoder_batch" not in given else view(given["mask_encoder_batch"])
    start = 0
    for encoder, decoder, new in rows_of(given):
        count = encoder if encoder > 0 else new if decoder > 0 else 0
        # The version with a mask counted prefill rows from 0 on, whatever they had cached.
        first = decoder if encoder == 0 or mask is None else 0
        for i in range(count):
            positions[start + i] = first + i
            if mask is not None:
                mask[start + i] = int(encoder > 0)
        start += count


def get_padding_offset(given):
    import torch

    ids, new = view(given["input_ids"]), view(given["seq_len"]).tolist()
    assert ids.shape[0] == len(new)
    assert ids.shape[1] >= max(new)
    cached = [0] * len(new)
    if given.get("seq_lens_decoder") is not None:
        cached = view(given["seq_lens_decoder"]).tolist()
    if "cpu_token_num" in given:
        room = given["cpu_token_num"]
        assert type(room) is int
        assert given["draft_tokens"] is None
    else:
        room = int(view(given["token_num"]).item())
        assert room == sum(new), "token_num is the number of tokens"
    if "cum_offsets" in given:
        total = 0
        for length, offset in zip(new, view(given["cum_offsets"]).tolist(), strict=True):
            total += ids.shape[1] - length
            assert offset == total
    slots = torch.full((room,), -1, dtype=torch.int32)
    found = torch.full((room,), 2, dtype=torch.int64)
    sums = [torch.zeros(len(new) + 1, dtype=torch.int32) for _ in range(2)]
    start = 0
    for b, length in enumerate(new):
        slots[start : start + length] = b
        found[start : start + length] = ids[b, :length]
        start += length
        sums[0][b + 1] = start
        sums[1][b + 1] = sums[1][b] + length + cached[b]
    return given_back(found, slots, *sums)


def get_block_shape_and_split_kv_block(given):
    import torch

    assert os.environ["FD_ATTENTION_BACKEND"] == "MLA_ATTN", "another backend's lists would be made"
    rows, block_size = rows_of(given), given["block_size"]
    is_old = "decoder_step_token_num" in given
    counts = [name for name in ("decoder_num_blocks_cpu", "decoder_num_blocks_x_cpu") if name in given]
    lists = [view(given[name]) for name in ("decoder_batch_ids", "decoder_tile_ids_per_batch")]
    with_token = [row for row in rows if row[2] > 0]

    def most(values):
        return max(values, default=0)

    maxima = view(given["max_len_tensor_cpu"])
    maxima[0] = most(row[2] for row in rows)
    maxima[1] = most(row[0] for row in rows)
    maxima[2] = most(row[1] for row in rows)
    maxima[3] = most(row[1] + row[2] for row in with_token)
    maxima[4] = most(row[1] for row in with_token if row[0] == 0)
    maxima[5] = most(row[1] + row[2] for row in with_token if row[1] > 0)
    chunk, tiles = 0, []
    if maxima[2] > 0:
        decodes = [(b, row[1] + row[2]) for b, row in enumerate(rows) if row[0] == 0 and row[2] > 0]
        chunk = 64
        if len(rows) > 1:
            candidates = [block_size << i for i in range(12)]
            left = [sum(-(-keys // one) for _, keys in decodes) % 132 for one in candidates]
            chunk = max(one for one, rest in zip(candidates, left, strict=True) if rest == max(left))
        tiles = [(b, tile) for b, keys in decodes for tile in range(-(-keys // chunk))]
        for one in lists:
            one.zero_()
        for n, (b, tile) in enumerate(tiles):
            lists[0][n], lists[1][n] = b, tile
        view(given[counts[0]])[0] = len(tiles)
    if not is_old:
        view(given["decoder_num_blocks_device"])[0] = len(tiles)
        view(given["decoder_chunk_size_device"])[0] = chunk
        if maxima[1] > 0:
            # Cleared for prefill rows, whatever the backend: two more than a row has keys.
            room = len(rows) * (int(maxima[3]) + 2)
            for name in ("encoder_batch_ids", "encoder_tile_ids_per_batch"):
                assert len(view(given[name])) >= room
                view(given[name])[:room] = 0
        return None
    numbers = [
        torch.tensor([value], dtype=torch.int32) for value in (0, 0, len(tiles), chunk, int(maxima[5]))
    ]
    empty = [torch.zeros(1, dtype=torch.int32) for _ in range(4)]
    return given_back(
        empty[0], empty[1], numbers[0], empty[2], empty[3], numbers[1], numbers[2], numbers[3], numbers[4]
    )


# ---- cache ---------------------------------------------------------------------------------------


def write(given, slots_to_write):
    latents, rope = view(given["kv_nope"]), view(given["kv_pe"])
    cache, tables = view(given["kv_cache"]), view(given["block_tables"])
    assert given["cache_quant_type_str"] == "none"
    assert str(latents.dtype) in {"torch.bfloat16", "torch.float16"}
    block_size, rank = cache.shape[2], latents.shape[1]
    for b, token, position in slots_to_write:
        row = cache[int(tables[b, position // block_size]), 0, position % block_size]
        row[:rank] = latents[token]
        row[rank:] = rope[token].flatten()


def tokens_of(given):
    """Slot, token and number within its row, of every token that is none of padding."""
    if "padding_offsets" in given:
        longest = given["max_seq_len"]
        for token, offset in enumerate(view(given["padding_offsets"]).tolist()):
            yield (token + offset) // longest, token, (token + offset) % longest
        return
    starts = view(given["cu_seqlens_q"]).tolist()
    for token, b in enumerate(view(given["batch_id_per_token"]).tolist()):
        if b >= 0:
            yield b, token, token - starts[b]


def prefill_mla_write_cache(given):
    encoder, decoder = view(given["seq_lens"]).tolist(), view(given["seq_lens_decoder"]).tolist()
    assert given.get("kv_signal_data") is None
    write(given, ((b, token, decoder[b] + i) for b, token, i in tokens_of(given) if encoder[b] > 0))


def decode_mla_write_cache(given):
    decoder, encoder = view(given["seq_lens"]).tolist(), view(given["seq_lens_encoder"]).tolist()
    found = [(b, token, i) for b, token, i in tokens_of(given) if decoder[b] > 0 and encoder[b] == 0]
    if not given["speculate_decoder"]:
        # A slot's first token, and no other.
        found = [one for one in found if one[2] == 0]
    write(given, ((b, token, decoder[b] + i) for b, token, i in found))


def dsk_attn_write_cache(given):
    import torch

    cache, slots = view(given["kv_cache"]), view(given["slot_mapping"])
    latents, rope = view(given["kv_nope"]).float(), view(given["kv_pe"])
    assert given["cache_quant_type_str"] == "fp8_ds_mla"
    assert cache.shape[3] == 656
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        row = cache[slot // cache.shape[2], 0, slot % cache.shape[2]]
        tiles = latents[token].view(4, 128)
        largest = tiles.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(1, keepdim=True)
        scales = (largest / 448).clamp_min(2.0**-126)
        packed = (tiles / scales).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        packed[(tiles / scales).isnan()] = 0x7F
        row[:512] = packed.flatten()
        row[512:528] = scales.flatten().view(torch.uint8)
        row[528:] = rope[token].flatten().view(torch.uint8)


# ---- attention -----------------------------------------------------------------------------------


def multi_head_latent_attention(given):
    import torch

    query, cache = view(given["query"]), view(given["key_cache"])
    assert given["value_cache"].data_ptr() == given["key_cache"].data_ptr()
    width, block_size, rank = cache.shape[3], cache.shape[2], given["nope_size"]
    heads = query.shape[1] // width
    assert (width, rank, block_size) == (576, 512, 64)
    assert heads in {8, 16, 64}
    assert given["compute_dtype"] == {"torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(query.dtype)]
    assert given["cache_quant_type_str"] == "none"
    assert given["causal"] is True
    assert all(given[name] is None for name in OPTIONAL)
    out = torch.zeros(len(query), heads * rank, dtype=query.dtype)
    if int(view(given["max_dec_len_this_time"])) == 0:
        return given_back(out)
    is_old = "decoder_chunk_size_cpu" in given
    chunk = int(view(given["decoder_chunk_size_cpu" if is_old else "decoder_chunk_size_device"]))
    count = int(view(given["decoder_num_blocks_cpu" if is_old else "decoder_num_blocks_device"]))
    decoder, new = view(given["seq_lens_decoder"]).tolist(), view(given["seq_lens_this_time"]).tolist()
    starts, tables = view(given["cu_seqlens_q"]).tolist(), view(given["block_tables"])
    tiles = [
        view(given[name])[:count].tolist() for name in ("decoder_batch_ids", "decoder_tile_ids_per_batch")
    ]
    listed = {}
    for b, tile in zip(*tiles, strict=True):
        listed.setdefault(b, []).append(tile)
    for b, found in listed.items():
        keys = decoder[b] + new[b]
        assert sorted(found) == list(range(-(-keys // chunk)))
        assert new[b] * heads <= 64
        assert new[b] == 1 or given["speculate_decoder"]
        assert keys <= int(view(given["max_len_kv"]))
        at = torch.arange(keys)
        rows = cache[tables[b, at // block_size].long(), 0, at % block_size].float()
        for i in range(new[b]):
            seen = rows[: decoder[b] + i + 1]
            q = query[starts[b] + i].view(heads, width).float()
            weights = (q @ seen.T * given["softmax_scale"]).softmax(1)
            out[starts[b] + i] = (weights @ seen[:, :rank]).flatten().to(out.dtype)
    return given_back(out)


def merge_prefill_decode_output(given):
    prefill, decode = view(given["encoder_res"]), view(given["decoder_res"])
    heads, width = given["head_num"], given["head_dim"]
    assert width in {128, 192, 256}
    assert prefill.shape == decode.shape == (len(prefill), heads * width)
    # As many tokens of a row as its blocks have warps.
    warps = width // 32
    most = -(-given["max_token"] // warps) * warps
    starts = view(given["cu_seq_q"]).tolist()
    for b, (encoder, decoder, new) in enumerate(rows_of(given)):
        if encoder == 0 and decoder > 0:
            tokens = slice(starts[b], starts[b] + min(new, most))
            prefill[tokens] = decode[tokens]


def fused_read_cache_and_interleave_naive(given):
    import torch

    cache, latents, rope = (view(given[name]) for name in ("latent_cache", "new_compressed_kv", "new_k_pe"))
    total, starts = view(given["cu_seqlens_k"]).tolist(), view(given["cu_seqlens_q"]).tolist()
    rank, block_size = given["kv_lora_rank"], given["block_size"]
    assert (rank, given["qk_rope_head_dim"]) == (latents.shape[1], rope.shape[1])
    rows = []
    for b in range(len(total) - 1):
        new = starts[b + 1] - starts[b]
        for j in range(total[b + 1] - total[b] - new):
            block = int(view(given["block_tables"])[b, j // block_size])
            rows.append(cache[block, 0, j % block_size])
        rows += [torch.cat([latents[t], rope[t]]) for t in range(starts[b], starts[b + 1])]
    found = torch.stack(rows) if rows else cache.new_empty((0, cache.shape[3]))
    return tuple(given_back(found[:, :rank].contiguous(), found[:, rank:].contiguous()))


fused_read_cache_and_interleave_triton = fused_read_cache_and_interleave_naive


# ---- layers --------------------------------------------------------------------------------------


def extract_decoder_token_from_q(given):
    import torch

    q, starts = view(given["q"]), view(given["cu_seqlens_q"]).tolist()
    encoder, decoder = (view(given[name]).tolist() for name in ("seq_lens_encoder", "seq_lens_decoder"))
    out = torch.full((len(decoder), q.shape[1]), torch.nan, dtype=q.dtype)
    lengths = torch.zeros(len(decoder), dtype=torch.int32)
    for b, cached in enumerate(decoder):
        if cached > 0 and encoder[b] == 0 and starts[b + 1] > starts[b]:
            out[b] = q[starts[b]]
            lengths[b] = cached + 1
    return given_back(out, lengths)


def insert_decoder_result_back(given):
    import torch

    result, starts = view(given["decoder_result"]), view(given["cu_seqlens_q"]).tolist()
    encoder, decoder = (view(given[name]).tolist() for name in ("seq_lens_encoder", "seq_lens_decoder"))
    assert result.shape[:2] == (len(decoder), 1)
    out = torch.zeros(given["mixed_token_num"], result.shape[2] * result.shape[3], dtype=result.dtype)
    for b, cached in enumerate(decoder):
        if cached > 0 and encoder[b] == 0 and starts[b + 1] > starts[b]:
            out[starts[b]] = result[b].flatten()
    return given_back(out)[0]


def compute_slot_mapping(given):
    import torch

    tables, size = view(given["block_tables"]), given["block_size"]
    out = torch.full((len(view(given["positions"])),), -1)
    both = zip(view(given["batch_id_per_token"]).tolist(), view(given["positions"]).tolist(), strict=True)
    for token, (b, position) in enumerate(both):
        if b >= 0 and position // size < tables.shape[1] and tables[b, position // size] >= 0:
            out[token] = int(tables[b, position // size]) * size + position % size
    return given_back(out)[0]


class Linear:
    """A layer that splits kv_b_proj when it has loaded; `split` gets a rank's slice in Paddle's layout."""

    def split(self, weight):
        import paddle

        assert paddle.get_default_dtype() == str(weight.dtype).rpartition(".")[2]
        heads, rest = divmod(self.num_attention_heads, self.fd_config.parallel_config.tensor_parallel_size)
        assert rest == 0
        found = view(weight.contiguous()).view(self.kv_lora_rank, heads, -1)
        assert found.shape[2] == self.qk_nope_head_dim + self.v_head_dim
        key = found[:, :, : self.qk_nope_head_dim].permute(1, 2, 0).contiguous()
        value = found[:, :, self.qk_nope_head_dim :].permute(1, 0, 2).contiguous()
        self.k_b_proj_weight, self.v_b_proj_weight = given_back(key, value)
        CALLS.append("KVBatchLinear")


class NewLinear(Linear):
    """Asks for the checkpoint's layout."""

    def __init__(
        self,
        fd_config,
        kv_b_proj,
        prefix="",
        kv_lora_rank=None,
        num_attention_heads=None,
        qk_nope_head_dim=None,
        v_head_dim=None,
    ):
        vars(self).update(locals())
        assert fd_config.load_config.load_choices == "default_v1"

    def process_weights_after_loading(self):
        weight = self.kv_b_proj.weight
        self.split(
            weight.transpose([1, 0]) if self.fd_config.model_config.model_format == "torch" else weight
        )


class MiddleLinear(NewLinear):
    """Gets Paddle's layout from the layer before it, whatever the checkpoint's."""

    def process_weights_after_loading(self):
        self.split(self.kv_b_proj.weight)


class OldLinear(Linear):
    """Loads from a checkpoint's state."""

    def __init__(
        self,
        fd_config,
        prefix="",
        kv_lora_rank=None,
        num_attention_heads=None,
        qk_nope_head_dim=None,
        v_head_dim=None,
        with_bias=False,
        skip_quant=False,
    ):
        vars(self).update(locals())

    def load_state_dict(self, state_dict):
        self.split(state_dict[f"{self.prefix}.weight"])


# ---- backends ------------------------------------------------------------------------------------

AT_IMPORT = {name: os.environ.get(name) for name in ("FD_ATTENTION_BACKEND", "USE_FLASH_MLA")}


class Backend:
    """What the backends have in common: prefill attention, a scale of their own, and `forward`."""

    def __init__(
        self, fd_config, kv_num_heads, num_heads, head_dim, encoder_block_shape_q=-1, decoder_block_shape_q=-1
    ):
        import math

        import paddle

        model = fd_config.model_config
        self.dtype = paddle.get_default_dtype()
        self.config, self.heads = fd_config, num_heads
        self.rank, self.rope = model.kv_lora_rank, model.qk_rope_head_dim
        self.block_size = fd_config.cache_config.block_size
        self.scale = (model.qk_nope_head_dim + model.qk_rope_head_dim) ** -0.5
        if model.rope_scaling:
            factor, all_dim = model.rope_scaling["factor"], model.rope_scaling["mscale_all_dim"]
            self.scale *= (0.1 * float(all_dim) * math.log(factor) + 1.0) ** 2
        assert kv_num_heads == 1
        assert (encoder_block_shape_q, decoder_block_shape_q) == (64, 16)
        CALLS.append(type(self).__name__)

    def get_kv_cache_shape(self, max_num_blocks, kv_cache_quant_type=None):
        return [max_num_blocks, 1, self.block_size, self.rank + self.rope], []

    def init_attention_metadata(self, forward_meta):
        import paddle

        # What is read when the package is imported stays.
        assert {name: os.environ.get(name) for name in AT_IMPORT} == AT_IMPORT
        assert AT_IMPORT["FD_ATTENTION_BACKEND"] == self.value
        assert paddle.get_default_dtype() == self.dtype
        self.rows = rows_of(vars(forward_meta))
        self.longest = max(row[0] for row in self.rows)
        self.longest_keys = max([row[1] + row[2] for row in self.rows if row[1] > 0 and row[2] > 0] + [0])

    def forward(self, q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta):
        assert forward_meta.forward_mode.is_mixed()
        return self.forward_mixed(q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta)

    def extend(self, q, k, v, meta, longest_keys):
        """Causal attention of every row, each row's last query at its last key."""
        import torch

        q, k, v = view(q), view(k), view(v)
        assert q.shape[1:] == k.shape[1:] == v.shape[1:]
        out = torch.zeros_like(q)
        queries, keys = view(meta.cu_seqlens_q).tolist(), view(meta.cu_seqlens_k).tolist()
        for b in range(len(queries) - 1):
            begin, end, count = queries[b], queries[b + 1], keys[b + 1] - keys[b]
            for t in range(begin, min(end, begin + self.longest)):
                seen = slice(keys[b], keys[b] + min(count - (end - t) + 1, longest_keys))
                logits = torch.einsum("hd,khd->hk", q[t].float(), k[seen].float()) * self.scale
                out[t] = torch.einsum("hk,khd->hd", logits.softmax(1), v[seen].float()).to(out.dtype)
        return given_back(out)[0]

    def attended(self, q, cache, tables, keys):
        """[H, R]: one query over the first keys of a block table's line."""
        import torch

        at = torch.arange(keys)
        rows = cache[tables[at // self.block_size].long(), 0, at % self.block_size].float()
        weights = (q.view(self.heads, -1).float() @ rows.T * self.scale).softmax(1)
        return (weights @ rows[:, : self.rank]).to(q.dtype)

    def by_slot(self, q, lengths, meta):
        """Decode rows, a query a slot; a slot without keys gives 0."""
        import torch

        q, cache, tables = view(q), view(meta.caches[0]), view(meta.block_tables)
        assert len(q) == len(tables)
        out = torch.zeros(len(q), 1, self.heads, self.rank, dtype=q.dtype)
        for b, keys in enumerate(lengths):
            if keys > 0:
                out[b, 0] = self.attended(q[b], cache, tables[b], keys)
        return given_back(out)[0]


class MLAAttentionBackend(Backend):
    """Decode rows are the compiled operator's, token by token, or FlashMLA's, which gets slots."""

    value = "MLA_ATTN"

    def init_attention_metadata(self, forward_meta):
        super().init_attention_metadata(forward_meta)
        names = "seq_lens_encoder seq_lens_decoder seq_lens_this_time decoder_batch_ids "
        names += "decoder_tile_ids_per_batch decoder_num_blocks_cpu max_len_tensor_cpu "
        given = {name: getattr(forward_meta, name) for name in (names + self.planned).split()}
        self.plan(given | {"block_size": self.block_size, "group_size": -1})

    planned = (
        "decoder_num_blocks_device decoder_chunk_size_device encoder_batch_ids encoder_tile_ids_per_batch"
    )

    def plan(self, given):
        get_block_shape_and_split_kv_block(given)
        self.counted = {
            "decoder_num_blocks_device": given["decoder_num_blocks_device"],
            "decoder_chunk_size_device": given["decoder_chunk_size_device"],
            "max_len_kv": given["max_len_tensor_cpu"][5],
        }

    def write(self, operator, lengths, others, compressed_kv, k_pe, cache, meta):
        operator(
            {
                **vars(meta),
                "kv_nope": compressed_kv,
                "kv_pe": k_pe,
                "kv_cache": cache,
                "seq_lens": lengths,
                **others,
                "cache_quant_type_str": "none",
                "speculate_decoder": self.config.speculative_config.method is not None,
            }
        )

    def by_token(self, q, cache, meta):
        speculation = self.config.speculative_config
        found = multi_head_latent_attention(
            {
                **vars(meta),
                **self.counted,
                **dict.fromkeys(OPTIONAL),
                "query": q,
                "key_cache": cache,
                "value_cache": cache,
                "max_dec_len_this_time": meta.max_len_tensor_cpu[2],
                "compute_dtype": {"bfloat16": "bf16", "float16": "fp16"}[self.dtype],
                "cache_quant_type_str": "none",
                "nope_size": self.rank,
                "softmax_scale": self.scale,
                "causal": True,
                "speculate_decoder": speculation.method is not None,
            }
        )
        return found[0]

    def forward_mixed(self, q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta):
        meta, cache = forward_meta, forward_meta.caches[layer.layer_id]
        encoder, decoder = meta.seq_lens_encoder, meta.seq_lens_decoder
        new = compressed_kv, k_pe, cache, meta
        if k is not None:
            self.write(prefill_mla_write_cache, encoder, {"seq_lens_decoder": decoder}, *new)
            return self.extend(q, k, v, meta, max(self.longest, self.longest_keys))
        self.write(decode_mla_write_cache, decoder, {"seq_lens_encoder": encoder}, *new)
        if os.environ.get("USE_FLASH_MLA", "0") == "0":
            return self.by_token(q, cache, meta)
        return self.by_slot(q, view(meta.cache_seqlens).tolist(), meta)


class MiddleMLAAttentionBackend(MLAAttentionBackend):
    """Before #7727: no prefix hits; FlashMLA's slots are taken out of the tokens here."""

    def forward_mixed(self, q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta):
        meta = forward_meta
        if k is not None or os.environ.get("USE_FLASH_MLA", "0") == "0":
            self.longest_keys = 0
            return super().forward_mixed(q, k, v, qkv, compressed_kv, k_pe, layer, meta)
        rows = {
            name: getattr(meta, name) for name in ("cu_seqlens_q", "seq_lens_encoder", "seq_lens_decoder")
        }
        slots, meta.cache_seqlens = extract_decoder_token_from_q({"q": q, **rows})
        found = super().forward_mixed(slots, k, v, qkv, compressed_kv, k_pe, layer, meta)
        return insert_decoder_result_back({"decoder_result": found, **rows, "mixed_token_num": q.shape[0]})


class OldMLAAttentionBackend(MiddleMLAAttentionBackend):
    """Its operators return lists of tiles, and its cache's shape is alone."""

    planned = ""

    def get_kv_cache_shape(self, max_num_blocks, kv_cache_quant_type=None):
        return tuple(super().get_kv_cache_shape(max_num_blocks)[0])

    def plan(self, given):
        assert self.config.parallel_config.max_model_len > 0
        count = self.config.speculative_config.num_speculative_tokens + 1
        found = get_block_shape_and_split_kv_block({**given, "decoder_step_token_num": count})
        self.counted = {
            "decoder_num_blocks_cpu": given["decoder_num_blocks_cpu"],
            "decoder_chunk_size_cpu": found[7],
            "max_len_kv": found[8],
        }


class WindowMLAAttentionBackend(MLAAttentionBackend):
    """After #8060: a layer's cache has a shape of its own."""

    def get_kv_cache_shape(self, max_num_blocks, kv_cache_quant_type=None, layer_id=None):
        return super().get_kv_cache_shape(max_num_blocks)


class TritonMLAAttentionBackend(Backend):
    """All tokens are written by their slots; decode rows, a query a slot, over the lengths of the step."""

    value = "TRITON_MLA_ATTN"

    def save(self, compressed_kv, k_pe, cache, meta):
        cache, latents, rope = view(cache), view(compressed_kv), view(k_pe)
        for token, slot in enumerate(view(meta.slot_mapping).tolist()):
            if slot >= 0:
                row = cache[slot // self.block_size, 0, slot % self.block_size]
                row[: self.rank], row[self.rank :] = latents[token], rope[token].flatten()

    def lengths(self):
        return [cached + new if cached > 0 else 0 for _, cached, new in self.rows]

    def forward_mixed(self, q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta):
        self.save(compressed_kv, k_pe, forward_meta.caches[layer.layer_id], forward_meta)
        if k is not None:
            return self.extend(q, k, v, forward_meta, max(self.longest, self.longest_keys))
        found = self.by_slot(q, self.lengths(), forward_meta)
        return found.reshape([len(self.rows), self.heads * self.rank])


class FirstTritonMLAAttentionBackend(TritonMLAAttentionBackend):
    """As #7852 first had it: it finds decode rows' tokens in the step."""

    def forward_mixed(self, q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta):
        import torch

        meta = forward_meta
        if k is not None:
            return super().forward_mixed(q, k, v, qkv, compressed_kv, k_pe, layer, meta)
        self.save(compressed_kv, k_pe, meta.caches[layer.layer_id], meta)
        assert not meta.step_use_cudagraph
        q, cache, tables = view(q), view(meta.caches[0]), view(meta.block_tables)
        out = torch.zeros(len(q), self.heads, self.rank, dtype=q.dtype)
        begins = view(meta.cu_seqlens_q).tolist()
        for b, keys in enumerate(self.lengths()):
            if self.rows[b][2] > 0 and keys > 0:
                out[begins[b]] = self.attended(q[begins[b]], cache, tables[b], keys)
        return given_back(out.flatten(1))[0]


# ---- signatures ----------------------------------------------------------------------------------

OPTIONAL = {
    "attn_mask",
    "query_bias",
    "query_out_scales",
    "cache_k_quant_scales",
    "cache_v_quant_scales",
    "cache_k_dequant_scales",
    "cache_v_dequant_scales",
    "cache_k_zp",
    "cache_v_zp",
    "out_linear_shifts",
    "out_linear_smooths",
}
TYPES = {
    "str": "compute_dtype compute_type cache_quant_type_str cache_quant_type",
    "int": (
        "cpu_token_num max_seq_len nope_size max_input_length head_num head_dim max_token block_size "
        "group_size encoder_block_shape_q decoder_block_shape_q speculate_max_draft_token_num "
        "decoder_step_token_num mixed_token_num kv_lora_rank qk_rope_head_dim"
    ),
    "float": "softmax_scale quant_max_bound quant_min_bound out_linear_in_scale",
    "bool": "causal speculate_decoder is_prefill",
}
TYPE_OF = {name: kind for kind, names in TYPES.items() for name in names.split()}
MEANT = {"compute_type": "compute_dtype", "cache_quant_type": "cache_quant_type_str"}


def operator(name, shown, meant=None, told="names"):
    """A function with a signature.

    Args:
        shown: the names that it is registered with.
        meant: those of the C++ function, where they differ.
        told: "names", as of Paddle's Python functions; "kinds", by pybind11's docstring; "refusal", by its
            TypeError alone.
    """
    order = [MEANT.get(one, one) for one in (meant or shown).split()]
    kinds = [TYPE_OF.get(one, "paddle.Tensor") for one in order]
    maybe = {*OPTIONAL, "draft_tokens", "kv_signal_data", "scale"}
    typed = [f"Optional[{kind}]" if one in maybe else kind for one, kind in zip(order, kinds, strict=True)]
    signature = f"({', '.join(f'arg{i}: {kind}' for i, kind in enumerate(typed))}) -> object"

    class Bound:
        __doc__ = f"{name}{signature}\n\n{name} function" if told == "kinds" else None

        def __call__(self, *arguments):
            if len(arguments) != len(order):
                supported = f"The following argument types are supported:\n    1. {signature}"
                said = supported if told == "refusal" else f"takes {len(order)}"
                raise TypeError(f"{name}(): incompatible function arguments. {said}\n\nInvoked with: ")
            for one, kind, value in zip(order, kinds, arguments, strict=True):
                is_tensor = hasattr(value, "data_ptr")
                fits = (
                    is_tensor or (value is None) if kind == "paddle.Tensor" else type(value).__name__ == kind
                )
                assert fits, f"{name} got {value!r} as {one}"
            CALLS.append(name)
            return globals()[name](dict(zip(order, arguments, strict=True)))

    bound = Bound()
    if told == "names":
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        bound.__signature__ = inspect.Signature([inspect.Parameter(one, kind) for one in shown.split()])
    return bound
