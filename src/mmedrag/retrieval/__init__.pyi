from . import select as select
from .embeddings import (
    EmbeddingCache as EmbeddingCache,
    ImageEmbeddings as ImageEmbeddings,
    embed_images as embed_images,
    embed_texts as embed_texts,
)
from .index import (
    Filter as Filter,
    IndexFolder as IndexFolder,
    index_info as index_info,
    verify_index as verify_index,
)
from .index_build import (
    add_to_index as add_to_index,
    build_index as build_index,
    remove_from_index as remove_from_index,
    update_index as update_index,
)
from .library import Index as Index
from .ranks import DEEPEST as DEEPEST, KS as KS, per_query as per_query, relevant as relevant
from .search import (
    NEAR as NEAR,
    Exclusion as Exclusion,
    Retriever as Retriever,
    open_retriever as open_retriever,
    released_rows as released_rows,
)
from .select import RuleSpec as RuleSpec
from .settings import RetrieverTraining as RetrieverTraining
from .train import open_tracker as open_tracker, train_retriever as train_retriever
