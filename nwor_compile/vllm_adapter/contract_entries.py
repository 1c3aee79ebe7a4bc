"""What this adapter relies on in vLLM, module by module; see NOTE [contract]."""

from __future__ import annotations

from nwor_compile.vllm_adapter.contract_forms import (
    Attributes,
    CustomOp,
    Entry,
    Function,
    Names,
    Text,
)
from nwor_compile.vllm_adapter.versions import (
    CUDA_END,
    KV_CACHE_LAYOUTS,
    KV_CACHE_UPDATE_BYPASS,
)

RUNNER = "v1/worker/gpu_model_runner.py"
GPU_WORKER = "v1/worker/gpu_worker.py"
CPU_WORKER = "v1/worker/cpu_worker.py"
ATTENTION = "model_executor/layers/attention/attention.py"
BACKEND = "v1/attention/backend.py"
CPU_BACKEND = "v1/attention/backends/cpu_attn.py"
FLASH_BACKEND = "v1/attention/backends/flash_attn.py"
V2_RUNNER = "v1/worker/gpu/model_runner.py"
V2_GRAPHS = "v1/worker/gpu/cudagraph_utils.py"
V2_INPUT_BATCH = "v1/worker/gpu/input_batch.py"
V2_BLOCK_TABLE = "v1/worker/gpu/block_table.py"
V2_SPECULATOR = "v1/worker/gpu/spec_decode/speculator.py"
REGISTRY = "v1/attention/backends/registry.py"
COMPILATION = "config/compilation.py"
METRICS = "v1/metrics/prometheus.py"
OFFLOADING = "distributed/kv_transfer/kv_connector/v1/offloading_connector.py"
OFFLOADING_SCHEDULER = "distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py"
OFFLOADING_WORKER = "distributed/kv_transfer/kv_connector/v1/offloading/worker.py"

# plugin.py, settings.py, named_pass.py, graph_pass.py
SWITCH: tuple[Entry, ...] = (
    Function("engine/arg_utils.py", "EngineArgs.create_engine_config", ("self",)),
    # Each engine's configuration is its own: what is put into it stays out of the next one's.
    Text(
        "engine/arg_utils.py", "EngineArgs.create_engine_config",
        "copy.deepcopy(self.compilation_config)",
    ),
    Function("plugins/__init__.py", "load_general_plugins", ()),
    Names("plugins/__init__.py", "", ("DEFAULT_PLUGINS_GROUP",)),
    Names("envs.py", "", ("environment_variables",)),
    # How `inductor_passes` finds what it names, and what it wraps it in.
    Text(COMPILATION, "CompilationConfig.__post_init__", "__import__(module).__dict__[func_name]"),
    Attributes(
        "compilation/passes/inductor_pass.py", "CallableInductorPass.__init__", ("callable",)
    ),
    Text("platforms/interface.py", "Platform.pass_key", "'post_grad_custom_post_pass'"),
    # The cache key: `additional_config` is hashed, and a pass by its uuid.
    Text(
        "config/vllm.py", "VllmConfig.compute_hash",
        "json.dumps(additional_config, sort_keys=True)",
    ),
    Text("config/utils.py", "normalize_value", "getattr(x, 'uuid', None)"),
)  # fmt: skip

# refusals.py
CONFIGURATION: tuple[Entry, ...] = (
    Names(
        "config/vllm.py", "VllmConfig",
        (
            "additional_config", "cache_config", "compilation_config", "device_config",
            "kv_transfer_config", "model_config", "parallel_config", "scheduler_config",
            "speculative_config", "use_v2_model_runner",
        ),
    ),
    Names(
        COMPILATION, "CompilationConfig",
        (
            "mode", "backend", "inductor_passes", "inductor_compile_config", "pass_config",
            "static_forward_context",
        ),
    ),
    Names(
        COMPILATION, "PassConfig",
        (
            "fuse_rope_kvcache", "fuse_qk_norm_rope_kvcache",
            "fuse_attn_quant",
        ),
    ),
    Names(
        "config/parallel.py", "ParallelConfig",
        (
            "worker_cls", "pipeline_parallel_size", "tensor_parallel_size",
            "decode_context_parallel_size", "prefill_context_parallel_size", "enable_dbo",
            "ubatch_size",
        ),
    ),
    Names("config/cache.py", "CacheConfig", ("kv_sharing_fast_prefill", "cache_dtype")),
    Names(
        "config/model.py", "ModelConfig",
        ("disable_cascade_attn", "enable_sleep_mode", "enforce_eager", "use_mla"),
    ),
    Names("config/device.py", "DeviceConfig", ("device_type",)),
    Names("config/scheduler.py", "SchedulerConfig", ("max_num_seqs", "max_num_batched_tokens")),
    Names("config/speculative.py", "SpeculativeConfig", ("method", "num_speculative_tokens")),
    Text("envs.py", "", "os.environ.get('VLLM_USE_BREAKABLE_CUDAGRAPH', '0')"),
)  # fmt: skip

# worker.py, staging_worker.py
WORKER: tuple[Entry, ...] = (
    Function(CPU_WORKER, "CPUWorker.init_device", ("self",)),
    Function(CPU_WORKER, "CPUWorker.compile_or_warm_up_model", ("self",)),
    Attributes(CPU_WORKER, "CPUWorker", ("model_runner",)),
    Function(GPU_WORKER, "Worker.sample_tokens", ("self", "grammar_output")),
    Function(GPU_WORKER, "Worker.shutdown", ("self",)),
    Attributes("v1/worker/worker_base.py", "WorkerBase", ("vllm_config", "rank")),
)

# runner.py
WINDOW: tuple[Entry, ...] = (
    Function(RUNNER, "GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config")),
    Function(
        RUNNER, "GPUModelRunner._calc_spec_decode_metadata",
        ("self", "num_draft_tokens", "cu_num_scheduled_tokens"),
    ),
    Function(RUNNER, "GPUModelRunner._model_forward", ("self", "input_ids", "positions")),
    Function(
        RUNNER, "GPUModelRunner._sample", ("self", "logits", "spec_decode_metadata"), exact=True
    ),
    Attributes(RUNNER, "GPUModelRunner", ("drafter", "query_start_loc", "compilation_config")),
    Function(
        "v1/spec_decode/llm_base_proposer.py", "SpecDecodeBaseProposer.load_model", ("self",)
    ),
    Function("v1/spec_decode/ngram_proposer.py", "NgramProposer.load_model", ("self",)),
    Names(
        "v1/spec_decode/metadata.py", "SpecDecodeMetadata",
        ("draft_token_ids", "cu_num_draft_tokens"),
    ),
    Names("v1/outputs.py", "SamplerOutput", ("sampled_token_ids",)),
    Names("forward_context.py", "ForwardContext", ("slot_mapping",)),
    Function("forward_context.py", "get_forward_context", ()),
    Names("v1/kv_cache_interface.py", "KVCacheConfig", ("kv_cache_groups",)),
    Names("v1/kv_cache_interface.py", "KVCacheGroupSpec", ("layer_names",)),
    Function("distributed/parallel_state.py", "get_tp_group", ()),
    Attributes("distributed/parallel_state.py", "GroupCoordinator", ("device_group",)),
)  # fmt: skip

# ops.py
TWINS: tuple[Entry, ...] = (
    Function(ATTENTION, "get_attention_context", ("layer_name",), exact=True),
    CustomOp(
        ATTENTION, "unified_kv_cache_update", (),
        "(key: torch.Tensor, value: torch.Tensor, layer_name: LayerNameType) -> torch.Tensor",
    ),
    CustomOp(
        ATTENTION, "unified_attention_with_output", ("output", "output_block_scale"),
        "(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, "
        "layer_name: LayerNameType, output_scale: torch.Tensor | None=None, "
        "output_block_scale: torch.Tensor | None=None, "
        "kv_cache_dummy_dep: torch.Tensor | None=None) -> None",
    ),
    Attributes(
        ATTENTION, "Attention",
        ("impl", "kv_cache", "attn_backend", "kv_sharing_target_layer_name"),
    ),
    Attributes(
        ATTENTION, "Attention", ("kv_cache_update_bypass",), since=KV_CACHE_UPDATE_BYPASS
    ),
    Function(
        "model_executor/layers/attention/kv_transfer_utils.py", "maybe_transfer_kv_layer",
        ("func",),
    ),
    Function("compilation/breakable_cudagraph.py", "eager_break_during_capture", ("fn",)),
    Function("utils/torch_utils.py", "_resolve_layer_name", ("layer_name",)),
    Names("utils/torch_utils.py", "", ("LayerNameType",)),
    Function(
        "utils/torch_utils.py", "direct_register_custom_op",
        ("op_name", "op_func", "mutates_args", "fake_impl", "target_lib"),
    ),
)  # fmt: skip

# spare_blocks.py, runner.py
TAIL_BLOCKS: tuple[Entry, ...] = (
    Names(
        "v1/kv_cache_interface.py", "KVCacheConfig",
        ("num_blocks", "kv_cache_tensors", "kv_cache_groups"),
    ),
    Names("v1/kv_cache_interface.py", "KVCacheTensor", ("size",)),
    Names(
        "v1/kv_cache_interface.py", "KVCacheTensor", ("layer_stride", "block_stride", "offset"),
        since=KV_CACHE_LAYOUTS,
    ),
    Names("v1/kv_cache_interface.py", "KVCacheSpec", ("block_size",)),
    Attributes(RUNNER, "GPUModelRunner", ("_kernel_block_sizes",)),
    Function("v1/worker/block_table.py", "BlockTable.get_device_tensor", ("self", "num_reqs")),
)  # fmt: skip

# cpu_backend.py
CPU_ATTENTION: tuple[Entry, ...] = (
    Names(REGISTRY, "AttentionBackendEnum", ("CPU_ATTN",)),
    Function(REGISTRY, "register_backend", ("backend", "class_path")),
    Function(REGISTRY, "AttentionBackendEnum.clear_override", ("self",)),
    Function(REGISTRY, "AttentionBackendEnum.get_path", ("self",)),
    Names(BACKEND, "AttentionType", ("DECODER",)),
    Names(BACKEND, "AttentionBackend", ("forward_includes_kv_cache_update",)),
    Function(BACKEND, "AttentionBackend.supports_non_causal", ("cls",)),
    Names(CPU_BACKEND, "CPUAttentionBackend", ("get_impl_cls", "get_builder_cls")),
    Names("v1/kv_cache_layout.py", "KVCacheLayout", ("LBNHC",), since=KV_CACHE_LAYOUTS),
    Function(
        BACKEND, "AttentionBackend.supported_kv_cache_layouts", ("cls",), since=KV_CACHE_LAYOUTS
    ),
    Attributes(
        CPU_BACKEND, "CPUAttentionBackendImpl",
        (
            "scale", "sliding_window", "logits_soft_cap", "alibi_slopes", "sinks", "attn_type",
            "kv_cache_dtype", "is_fp8_kv_cache",
        ),
    ),
    Function(
        CPU_BACKEND, "CPUAttentionBackendImpl.forward",
        (
            "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output",
            "output_scale", "output_block_scale",
        ),
        exact=True,
    ),
    Function(
        CPU_BACKEND, "CPUAttentionBackendImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"), exact=True,
    ),
    Function(
        BACKEND, "AttentionMetadataBuilder.__init__",
        ("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
    ),
    Function(
        BACKEND, "AttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"), exact=True,
    ),
    Names(
        BACKEND, "CommonAttentionMetadata",
        (
            "num_actual_tokens", "query_start_loc", "seq_lens", "max_seq_len",
            "block_table_tensor", "slot_mapping",
        ),
    ),
)  # fmt: skip

# cuda_configure.py, cuda_worker.py, device_runner.py, cuda_backend.py; see RUN_ON_CUDA
CUDA: tuple[Entry, ...] = (
    Names("config/vllm.py", "VllmConfig", ("attention_config", "lora_config"), until=CUDA_END),
    Names(
        COMPILATION, "CompilationConfig",
        ("use_inductor_graph_partition", "splitting_ops"), until=CUDA_END,
    ),
    # runner.py, where ranks share their error flag.
    Attributes(
        "distributed/parallel_state.py", "GroupCoordinator", ("device_communicator",),
        until=CUDA_END,
    ),
    Attributes(
        "distributed/device_communicators/cuda_communicator.py", "CudaCommunicator",
        ("pynccl_comm",), until=CUDA_END,
    ),
    Function(
        "distributed/device_communicators/pynccl.py", "PyNcclCommunicator.all_reduce",
        ("self", "in_tensor", "out_tensor", "op", "stream"), until=CUDA_END,
    ),
    # graph_split.py: the cut, and that it is looked up where it is replaced.
    Function(
        "compilation/backends.py", "split_graph", ("graph", "splitting_ops"), exact=True,
        until=CUDA_END,
    ),
    Text(
        "compilation/backends.py", "VllmBackend.__call__", "split_graph(graph, fx_split_ops)",
        until=CUDA_END,
    ),
    # spare_blocks.py: caches are as large as their tensors, whatever `num_blocks` says.
    Text(
        "v1/worker/gpu/attn_utils.py", "_reshape_kv_cache",
        "kv_raw_tensor.numel() // kv_cache_spec.page_size_bytes", until=CUDA_END,
    ),
    Function(GPU_WORKER, "Worker.determine_available_memory", ("self",), until=CUDA_END),
    Function(V2_RUNNER, "GPUModelRunner.get_kv_cache_spec", ("self",), until=CUDA_END),
    Function(RUNNER, "GPUModelRunner.get_kv_cache_spec", ("self",), until=CUDA_END),
    Attributes(
        V2_RUNNER, "GPUModelRunner", ("block_tables", "input_buffers", "kernel_block_sizes"),
        until=CUDA_END,
    ),
    # device_runner.py: openings are recorded over these, padded as they are behind a step's part.
    Attributes(
        V2_BLOCK_TABLE, "BlockTables", ("input_block_tables", "slot_mappings"), until=CUDA_END
    ),
    Attributes(
        V2_INPUT_BATCH, "InputBuffers", ("query_start_loc", "seq_lens", "input_ids"),
        until=CUDA_END,
    ),
    Text(
        V2_RUNNER, "GPUModelRunner.prepare_inputs",
        "async_copy_to_gpu(query_start_loc_np, out=self.input_buffers.query_start_loc)",
        until=CUDA_END,
    ),
    Text(
        V2_RUNNER, "GPUModelRunner.prepare_inputs",
        "query_start_loc_np[num_reqs + 1 :] = num_tokens", until=CUDA_END,
    ),
    Text(
        V2_INPUT_BATCH, "_prepare_pos_seq_lens_kernel",
        "tl.store(seq_lens_ptr + block, 0, mask=mask)", until=CUDA_END,
    ),
    Text(
        V2_BLOCK_TABLE, "_compute_slot_mappings_kernel",
        "tl.store(slot_mapping_ptr + offset, PAD_ID, mask=offset < max_num_tokens)",
        until=CUDA_END,
    ),
    Function(GPU_WORKER, "Worker.init_device", ("self",), until=CUDA_END),
    Function(GPU_WORKER, "Worker.load_model", ("self",), until=CUDA_END),
    Function(GPU_WORKER, "Worker.compile_or_warm_up_model", ("self",), until=CUDA_END),
    Attributes(GPU_WORKER, "Worker", ("model_runner", "use_v2_model_runner"), until=CUDA_END),
    Function(
        V2_RUNNER, "GPUModelRunner.initialize_kv_cache", ("self", "kv_cache_config"),
        until=CUDA_END,
    ),
    Function(V2_RUNNER, "GPUModelRunner.prepare_attn", ("self", "input_batch"), until=CUDA_END),
    Function(
        V2_RUNNER, "GPUModelRunner.execute_model", ("self", "scheduler_output"), until=CUDA_END
    ),
    Function(
        V2_RUNNER, "GPUModelRunner.sample",
        ("self", "hidden_states", "input_batch", "grammar_output"), exact=True, until=CUDA_END,
    ),
    # In this order: slots, forward, sample, the copy of the output, the drafter.
    Text(
        V2_RUNNER, "GPUModelRunner.execute_model", "self.prepare_attn(input_batch)", until=CUDA_END
    ),
    Text(
        V2_RUNNER, "GPUModelRunner.sample_tokens",
        "self.sample(hidden_states, input_batch, grammar_output)", until=CUDA_END,
    ),
    # context_graphs.py: graphs by descriptor, and those to capture, are what its copy replaces.
    Function(V2_GRAPHS, "ModelCudaGraphManager.capture", ("self", "model"), until=CUDA_END),
    Function(V2_GRAPHS, "ModelCudaGraphManager.run_fullgraph", ("self", "desc"), until=CUDA_END),
    Attributes(V2_GRAPHS, "CudaGraphManager", ("graphs", "_capture_descs"), until=CUDA_END),
    Names(
        V2_GRAPHS, "BatchExecutionDescriptor", ("num_tokens", "num_reqs"), until=CUDA_END
    ),
    Names(
        V2_INPUT_BATCH, "InputBatch", ("seq_lens_cpu_upper_bound",),
        until=CUDA_END,
    ),
    Text(
        V2_RUNNER, "GPUModelRunner.execute_model",
        "self.cudagraph_manager.run_fullgraph(batch_desc)", until=CUDA_END,
    ),
    Function(
        V2_SPECULATOR, "DraftModelSpeculator.load_model", ("self", "target_model"), until=CUDA_END
    ),
    Attributes(
        V2_SPECULATOR, "DraftModelSpeculator", ("draft_attn_layer_names",), until=CUDA_END
    ),
    Names(
        V2_INPUT_BATCH, "InputBatch",
        (
            "num_draft_tokens", "cu_num_logits", "query_start_loc", "seq_lens", "input_ids",
            "num_reqs", "num_reqs_after_padding", "num_tokens",
        ),
        until=CUDA_END,
    ),
    Names(
        "v1/worker/gpu/sample/output.py", "SamplerOutput",
        ("sampled_token_ids", "num_sampled", "num_rejected"), until=CUDA_END,
    ),
    Names(REGISTRY, "AttentionBackendEnum", ("FLASH_ATTN",), until=CUDA_END),
    Function("v1/attention/selector.py", "_cached_get_attn_backend", (), until=CUDA_END),
    Function(
        FLASH_BACKEND, "FlashAttentionImpl.forward",
        (
            "self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output",
            "output_scale", "output_block_scale",
        ),
        exact=True, until=CUDA_END,
    ),
    Function(
        FLASH_BACKEND, "FlashAttentionImpl.do_kv_cache_update",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"), exact=True, until=CUDA_END,
    ),
    Attributes(
        FLASH_BACKEND, "FlashAttentionImpl",
        (
            "num_heads", "num_kv_heads", "head_size", "scale", "sliding_window", "logits_soft_cap",
            "alibi_slopes", "sinks", "attn_type", "kv_cache_dtype",
        ),
        until=CUDA_END,
    ),
    Names(
        FLASH_BACKEND, "FlashAttentionMetadata", ("query_start_loc", "seq_lens", "block_table"),
        until=CUDA_END,
    ),
    # Steps whose graphs need no schedule for FlashAttention 3.
    Function(
        FLASH_BACKEND, "FlashAttentionMetadataBuilder.build",
        ("self", "common_prefix_len", "common_attn_metadata", "fast_build"), exact=True,
        until=CUDA_END,
    ),
    Text(
        FLASH_BACKEND, "FlashAttentionMetadataBuilder.build",
        "self.aot_schedule and not fast_build and not envs.VLLM_BATCH_INVARIANT", until=CUDA_END,
    ),
    Attributes(
        FLASH_BACKEND, "FlashAttentionMetadataBuilder",
        (
            "aot_sliding_window", "rswa_window", "compilation_config", "num_heads_q",
            "num_heads_kv", "headdim",
        ),
        until=CUDA_END,
    ),
    Function(FLASH_BACKEND, "FlashAttentionBackend.get_builder_cls", (), until=CUDA_END),
    Text(
        BACKEND, "AttentionMetadataBuilder.build_for_cudagraph_capture",
        "self.build(common_prefix_len=0, common_attn_metadata=common_attn_metadata)",
        until=CUDA_END,
    ),
    Attributes(BACKEND, "AttentionMetadataBuilder", ("layer_names",), until=CUDA_END),
    Names(
        BACKEND, "CommonAttentionMetadata",
        ("num_reqs", "num_actual_tokens", "max_query_len", "causal", "mm_req_doc_ranges"),
        until=CUDA_END,
    ),
    Attributes(
        "v1/spec_decode/llm_base_proposer.py", "SpecDecodeBaseProposer",
        ("_draft_attn_layer_names",), until=CUDA_END,
    ),
)  # fmt: skip

# metrics.py, staging_worker.py
FIGURES: tuple[Entry, ...] = (
    Names(
        "config/parallel.py", "ParallelConfig",
        ("_api_process_count", "_api_process_rank", "data_parallel_index"),
    ),
    Names("config/model.py", "ModelConfig", ("served_model_name",)),
    # The process registry with one server; a MultiProcessCollector in a new one with several.
    Text(METRICS, "get_prometheus_registry", "multiprocess.MultiProcessCollector(registry)"),
    Text(METRICS, "unregister_vllm_metrics", "collector._name.startswith('vllm:')"),
    Function("v1/metrics/reader.py", "get_metrics_snapshot", ()),
)  # fmt: skip

# cpu_sampling.py
SAMPLER: tuple[Entry, ...] = (
    Function(
        "v1/sample/rejection_sampler.py", "expand_batch_to_tokens",
        ("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"), exact=True,
    ),
    Function(
        "v1/sample/rejection_sampler.py", "rejection_sample",
        (
            "draft_token_ids", "num_draft_tokens", "max_spec_len", "cu_num_draft_tokens",
            "draft_probs", "target_logits", "bonus_token_ids", "sampling_metadata",
            "synthetic_mode", "synthetic_conditional_rates",
        ),
    ),
)  # fmt: skip

# offload.py, offload_configure.py; see NOTE [offload], whose numbers these are
OFFLOAD: tuple[Entry, ...] = (
    Names(
        "config/kv_transfer.py", "KVTransferConfig",
        (
            "kv_connector", "kv_connector_module_path", "kv_connector_extra_config", "kv_role",
        ),
    ),
    Text(
        "distributed/kv_transfer/kv_connector/factory.py",
        "KVConnectorFactory.get_connector_class",
        "importlib.import_module(connector_module_path)",
    ),
    Function(
        OFFLOADING, "OffloadingConnector.__init__",
        ("self", "vllm_config", "role", "kv_cache_config"), exact=True,
    ),
    Attributes(OFFLOADING, "OffloadingConnector", ("connector_scheduler", "connector_worker")),
    Function(OFFLOADING, "OffloadingConnector.register_kv_caches", ("self", "kv_caches")),
    Function(
        OFFLOADING, "OffloadingConnector.get_required_kvcache_layout", ("cls", "vllm_config")
    ),
    Attributes(OFFLOADING_WORKER, "OffloadingConnectorWorker", ("kv_cache_config",)),
    # 1 and 4: tokens whose ids are known, counted in one place.
    Function(
        OFFLOADING_SCHEDULER, "OffloadingConnectorScheduler._calc_num_offloadable_tokens",
        ("self", "req_status", "num_computed_tokens"),
    ),
    Text(
        OFFLOADING_SCHEDULER, "OffloadingConnectorScheduler._calc_num_offloadable_tokens",
        "min(num_computed_tokens, req_status.req.num_tokens)",
    ),
    # 2: stores wait for the next step, and the copy for the main stream.
    Text(
        OFFLOADING_WORKER, "OffloadingConnectorWorker.prepare_store_kv",
        "self._unsubmitted_store_jobs.append((job_id, entry.src_spec, entry.dst_spec))",
    ),
    Text(
        "v1/kv_offload/cpu/gpu_worker.py", "SingleDirectionOffloadingHandler.transfer_async",
        "stream.wait_stream(current_platform.current_stream())", until=CUDA_END,
    ),
    Text(
        V2_RUNNER, "GPUModelRunner.sample_tokens",
        "self.kv_connector.post_forward(finished_req_ids)", until=CUDA_END,
    ),
    # 3: freed blocks wait for the steps that may still write them.
    Text(
        "v1/core/sched/scheduler.py", "Scheduler.__init__",
        "multiple_inflight_batches and kv_transfer_config.is_kv_consumer", until=CUDA_END,
    ),
)  # fmt: skip

CONTRACT: tuple[Entry, ...] = (
    *SWITCH, *CONFIGURATION, *WORKER, *WINDOW, *TWINS, *TAIL_BLOCKS, *CPU_ATTENTION, *CUDA,
    *FIGURES, *SAMPLER, *OFFLOAD,
)  # fmt: skip
