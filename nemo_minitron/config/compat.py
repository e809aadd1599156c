"""NeMo 24.07: its names of settings that are called otherwise here, and those that have no effect.

They hold for the commands whose entry in nemo_minitron.config.commands says `nemo_names`.
"""

#: NeMo 24.07's name -> the name here.
RENAMED = {"name": "exp_manager.name", "prune.num_calib_size": "prune.num_samples"}

#: Settings of NeMo 24.07's scripts without effect here, by the reason why; a field of the same name wins.
UNUSED = {
    "the engine chooses kernels, fusions, recomputation and communication": """
        model.activations_checkpoint_* model.apply_rope_fusion model.async_grad_allreduce model.batch_p2p_comm
        model.bias_activation_fusion model.bias_dropout_add_fusion model.cpu_offloading* model.cross_entropy_loss_fusion
        model.fp8* model.fsdp* model.gc_interval model.grad_allreduce_chunk_size_mb model.grad_div_ar_fusion
        model.gradient_accumulation_fusion model.gradient_as_bucket_view model.masked_softmax_fusion model.mcore_gpt
        model.megatron_amp_O2 model.megatron_legacy model.native_amp_* model.nsys_profile.*
        model.num_micro_batches_with_partial_activation_checkpoints model.optim.bucket_cap_mb
        model.optim.contiguous_* model.optim.grad_sync_dtype model.optim.overlap_* model.overlap_p2p_comm
        model.persist_layer_norm model.sync_batch_comm model.transformer_engine model.ub_tp_comm_overlap*
        model.use_cpu_initialization model.use_flash_attention trainer.benchmark trainer.use_distributed_sampler""",
    "the checkpoint says what the model is": """
        model.activation model.apply_query_key_layer_scaling model.attention_dropout model.bias model.ffn_dropout
        model.ffn_hidden_size model.hidden_dropout model.hidden_size model.init_method_std model.kv_channels
        model.layernorm_epsilon model.make_vocab_size_divisible_by model.max_position_embeddings model.normalization
        model.num_attention_heads model.num_layers model.num_query_groups model.position_embedding_type
        model.post_process model.pre_process model.rotary_base model.rotary_percentage model.scale_positional_embedding
        model.seq_len_interpolation_factor model.share_embeddings_and_output_weights model.tokenizer.*""",
    "a checkpoint must hold just the weights that its configuration describes": "model.dist_ckpt_load_strictness",
    "logs and checkpoints are written the same way in every run": """
        exp_manager.checkpoint_callback_params.* exp_manager.create_checkpoint_callback
        exp_manager.create_tensorboard_logger exp_manager.create_wandb_logger exp_manager.ema.*
        exp_manager.log_step_timing exp_manager.resume_* exp_manager.step_timing_kwargs.*
        exp_manager.wandb_logger_kwargs.* model.dist_ckpt_format model.dist_ckpt_parallel_* trainer.enable_*
        trainer.logger""",
    "runs are counted in steps and whole samples": """
        model.data.data_impl model.data.dataloader_type model.data.eod_mask_loss model.data.exchange_indices_distributed
        model.data.no_seqlen_plus_one_input_tokens model.data.pad_samples_to_global_batch_size
        model.data.reset_attention_mask model.data.reset_position_ids model.data.shuffle_documents
        model.data.skip_warmup model.data.splits_string model.data.validation_drop_last model.rampup_batch_size
        trainer.accumulate_grad_batches trainer.limit_test_batches trainer.max_epochs trainer.max_time""",
    "pruning scores samples of the tokenised data and generates nothing": """
        inference.add_BOS inference.all_probs inference.compute_logprob inference.end_strings inference.greedy
        inference.max_context_length inference.min_tokens_to_generate inference.repetition_penalty
        inference.temperature inference.tokens_to_generate inference.top_k inference.top_p model.sequence_parallel
        prune.calib_dataset""",
}
