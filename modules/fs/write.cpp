module;

module cobuild.fs;
