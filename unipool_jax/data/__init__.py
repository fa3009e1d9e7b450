"""Data: text files -> token store -> batches. Imports nothing of the model.

    tokenizer, train_tokenizer   text <-> ids; the built-in tokenizers
    readers                      documents of text, jsonl and parquet files
    splits                       which documents are train, valid, test
    token_store                  build a store (`build_store`, `cached_store`), open one (`open_store`)
    store_format, store_writer, store_reader, megatron, opening   the parts of `token_store`
    streams, pipeline            windows and batches: `WindowSource`, `training_batches`, `EvalWindows`
    unigram                      a baseline that any trained model has to beat

To evaluate on any text file, put all of it into one split:

    store = cached_store(["notes.txt"], "cache", "gpt2", split=(0, 0, 1))
    batches = evaluation_batches(EvalWindows(store, "test", 1024), batch_size=8)
"""
