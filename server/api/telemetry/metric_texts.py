"""What each of the engine's metrics means, as Prometheus shows it. Knows names only."""

from __future__ import annotations

ENGINE_TEXTS = {
    "steps": "Forward passes",
    "steps_ahead": "Forward passes launched before the tokens of the one before were read",
    "step_seconds": "Time of one forward pass, tokens read back",
    "computed_prompt_tokens": "Prompt tokens computed, those computed again after a preemption included",
    "generated_tokens": "Tokens drawn, those of aborted requests included",
    "draft_tokens": "Tokens that prompt lookup guessed and a forward pass computed",
    "accepted_draft_tokens": "Tokens that prompt lookup guessed rightly: each saved its request a forward pass",
    "finished": "Requests that ended by themselves",
    "aborted": "Requests that ended because their client hung up or the server stopped",
    "failed": "Requests that ended with an error",
    "preemptions": "Times that a running request gave up its slot or its KV blocks and was computed again later",
    "isolated_steps": "Forward passes repeated request by request, because one request made the whole pass fail",
    "quarantined": "Adapters put into quarantine because their logits were not finite",
    "expired": "Requests that passed their own deadline",
    "adapter_moves": "Adapters moved within device memory to join free ranges",
    "adapter_load_seconds": "Time of one load from disk to host memory",
    "host_load_failures": "Loads from disk that failed",
    "prefix_hit_tokens": "Prompt tokens found in the prefix cache",
    "prefix_query_tokens": "Prompt tokens looked up in the prefix cache",
    "adapter_hits": "Adapters asked for that were there, by tier of memory",
    "adapter_misses": "Adapters asked for that were not there, by tier of memory",
    "adapter_evictions": "Adapters removed to make room for others, by tier of memory",
    "adapter_loads": "Adapters brought in, by tier of memory",
    "adapter_host_bytes": "Bytes of adapters in host memory",
    "adapter_pool_largest_free_ratio": "Largest free range of adapter memory over all that is free; 1: not fragmented",
    "adapter_pool_usage_ratio": "Adapter memory in use on the device, 0 to 1",
    "adapter_working_set_ratio": "Adapter bytes used in the last minute over the pool; above 1 they evict each other",
    "adapters_resident": "Adapters on the device",
    "fairness_jain": "Jain's index of service over tenants that waited in the last window; 1: even",
    "tenants_waiting": "Tenants with a request in the queue",
    "num_requests_waiting": "Requests in the queue",
    "num_requests_running": "Requests that hold a running slot",
    "kv_cache_usage_ratio": "KV blocks in use, 0 to 1",
}


def engine_text(name: str) -> str:
    """The help text of `multilora_NAME`."""
    return ENGINE_TEXTS.get(name, "Of the engine")
