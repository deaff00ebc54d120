//! DNS: the names that imports give, what is answered for each, and the cache of foreign answers.
