'use strict';
// What the pages of test_clients.py and test_tus_clients.py have in common: each library
// behind the same few words, and a record of what it sent and what it told its user.

var requests = [], finished = [], failed = [], client;

(function watch(proto) {
  var open = proto.open, send = proto.send, set = proto.setRequestHeader;
  proto.open = function (method, url) {
    this.told = {method: method, url: url, headers: {}, status: null, answer: null};
    return open.apply(this, arguments);
  };
  proto.setRequestHeader = function (name, value) {
    this.told.headers[name.toLowerCase()] = value;
    return set.apply(this, arguments);
  };
  proto.send = function (body) {
    var told = this.told, fields = {}, files = [];
    if (body instanceof FormData) {
      Array.from(body).forEach(function (one) {
        if (one[1] instanceof Blob) files.push({field: one[0], size: one[1].size});
        else fields[one[0]] = one[1];
      });
      told.kind = 'form';
    } else {
      told.kind = body instanceof Blob ? 'raw' : body ? 'text' : 'none';
      if (body instanceof Blob) files.push({size: body.size});
    }
    Object.assign(told, {fields: fields, files: files});
    requests.push(told);
    this.addEventListener('readystatechange', function () {
      if (this.readyState !== 4) return;
      told.status = this.status;
      if (!this.responseType || this.responseType === 'text') {
        told.answer = this.responseText;
      }
    });
    return send.apply(this, arguments);
  };
})(XMLHttpRequest.prototype);

function asText(value) {
  return typeof value === 'string' ? value : JSON.stringify(value);
}

function succeeded(name, answer) {
  finished.push({name: name, answer: asText(answer)});
}

function gaveUp(name, message) {
  failed.push({name: name, message: asText(message)});
}

// tus-js-client takes a relative Location for one of the page, unless this is absolute.
function absolute(url) {
  return new URL(url, location.href).href;
}

// Each returns what a page does with the library: add(files), and what else it can.
var LIBRARIES = {
  simple: function (url, options) {
    var own = new Uploader(Object.assign({target: url}, options));
    own.on('filesSubmitted', function () { own.upload(); });
    own.on('fileSuccess', function (root, file, message) {
      succeeded(file.relativePath, message);
    });
    own.on('fileError', function (root, file, message) {
      gaveUp(file.relativePath, message);
    });
    return {
      add: function (files) { own.addFiles(files); },
      cancel: function () { own.cancel(); },
      pause: function () { own.pause(); },
      resume: function () { own.resume(); },
    };
  },

  dropzone: function (url, options) {
    Dropzone.autoDiscover = false;
    var own = new Dropzone('#drop', Object.assign({url: url}, options));
    own.on('success', function (file, answer) { succeeded(file.name, answer); });
    own.on('error', function (file, message) {
      gaveUp(file.name, message.error || message);
    });
    return {
      add: function (files) { files.forEach(function (file) { own.addFile(file); }); },
      cancel: function () { own.removeAllFiles(true); },
    };
  },

  fine: function (url, options) {
    var request = Object.assign({endpoint: url}, options.request);
    var reasons = {}, deleted = [];
    var own = new qq.FineUploaderBasic(Object.assign({}, options, {
      request: request,
      callbacks: {
        onComplete: function (id, name, answer) {
          if (answer.success) succeeded(name, answer);
          else gaveUp(name, reasons[id]);
        },
        onError: function (id, name, reason) { reasons[id] = reason; },
        onDeleteComplete: function (id, xhr, isError) {
          deleted.push({status: xhr.status, isError: isError});
        },
      },
    }));
    return {
      add: function (files) { own.addFiles(files); },
      cancel: function () { own.cancelAll(); },
      pause: function () { return own.pauseUpload(0); },
      resume: function () { own.continueUpload(0); },
      remove: function (id) { own.deleteFile(id); },
      resumable: function () { return own.getResumableFilesData(); },
      deleted: deleted,
    };
  },

  plupload: function (url, options) {
    var own = new plupload.Uploader(Object.assign({
      runtimes: 'html5', browse_button: 'drop', url: url,
    }, options));
    own.bind('FilesAdded', function () { own.start(); });
    own.bind('FileUploaded', function (up, file, result) {
      succeeded(file.name, result.response);
    });
    own.bind('Error', function (up, error) {
      gaveUp(error.file.name, error.response || error.message);
    });
    own.init();
    return {
      add: function (files) { own.addFile(files); },
      cancel: function () { own.splice(); },
      pause: function () { own.stop(); },
      resume: function () { own.start(); },
    };
  },

  blueimp: function (url, options) {
    function rows(listed) {
      return $($.map(listed.files, function (file) {
        return $('<p class="template-upload"><b class="error"></b></p>')
          .append(document.createTextNode(file.error || file.name)).get(0);
      }));
    }
    var own = $('#drop').fileupload(Object.assign({
      url: url, dataType: 'json', fileInput: null, dropZone: null, pasteZone: null,
      // What the UI build needs besides.
      autoUpload: true, filesContainer: $('#drop'), uploadTemplateId: null,
      downloadTemplateId: null, uploadTemplate: rows, downloadTemplate: rows,
    }, options));
    var running = [];
    own.on('fileuploadadd', function (event, data) { running.push(data); });
    own.on('fileuploaddone', function (event, data) {
      succeeded(data.files[0].name, data.result);
    });
    own.on('fileuploadfail', function (event, data) {
      var answer = data.jqXHR && data.jqXHR.responseText;
      gaveUp(data.files[0].name, answer || data.errorThrown);
    });
    return {
      add: function (files) { own.fileupload('add', {files: files}); },
      cancel: function () { running.forEach(function (one) { one.abort(); }); },
    };
  },

  uploady: function (url, options) {
    var React = bundled.React, own;
    function Child() {
      own = bundled.useUploady();
      bundled.useItemFinishListener(function (item) {
        succeeded(item.file.name, item.uploadResponse);
      });
      bundled.useItemErrorListener(function (item) {
        gaveUp(item.file.name, item.uploadResponse);
      });
      return null;
    }
    var root = bundled.createRoot(document.getElementById('drop'));
    bundled.flushSync(function () {
      root.render(React.createElement(
        bundled.ChunkedUploady,
        Object.assign({destination: {url: url}}, options),
        React.createElement(Child)
      ));
    });
    return {
      add: function (files) { own.upload(files); },
      cancel: function () { own.abort(); },
    };
  },

  uppy: function (url, options) {
    var own = new bundled.Uppy({autoProceed: true});
    if (options.tus) {
      own.use(bundled.Tus, Object.assign({endpoint: absolute(url)}, options.tus));
    } else {
      own.use(bundled.XHRUpload, Object.assign({endpoint: url}, options));
    }
    own.on('upload-success', function (file, answer) {
      succeeded(file.name, answer.body);
    });
    own.on('upload-error', function (file, error, answer) {
      var text = error.originalResponse && error.originalResponse.getBody();
      gaveUp(file.name, text || answer && answer.responseText || error.message);
    });
    return {
      add: function (files) {
        own.addFiles(files.map(function (file) {
          return {name: file.name, type: file.type, data: file};
        }));
      },
      cancel: function () { own.cancelAll(); },
      pause: function () { own.pauseAll(); },
      resume: function () { own.resumeAll(); },
      retry: function () { own.retryAll(); },
    };
  },

  filepond: function (url, options) {
    function sentence(text) {
      try { return JSON.parse(text).error; } catch (error) { return text; }
    }
    var own = FilePond.create(document.getElementById('drop'), Object.assign({
      allowMultiple: true,
      server: {
        url: url,
        process: {url: '', onerror: sentence},
        patch: {url: '?patch=', onerror: sentence},
        revert: {url: '', onerror: sentence},
      },
      labelFileProcessingRevertError: function (error) { return error.body; },
      labelFileProcessingError: function (error) { return error.body; },
    }, options));
    own.on('processfile', function (error, item) {
      if (!error) succeeded(item.filename, item.serverId);
    });
    own.on('error', function (error, item) { gaveUp(item.filename, error); });
    return {
      add: function (files) { own.addFiles(files); },
      cancel: function () { own.removeFiles({revert: true}); },
      retry: function () { own.processFiles(); },
      abort: function () {
        document.querySelector('.filepond--action-abort-item-processing').click();
      },
    };
  },

  tus: function (url, options) {
    var running = [];
    return {
      add: function (files) {
        files.forEach(function (file) {
          var own = new tus.Upload(file, Object.assign({
            endpoint: absolute(url),
            metadata: {filename: file.name, filetype: file.type},
            onSuccess: function () { succeeded(file.name, own.url); },
            onError: function (error) { gaveUp(file.name, error.message); },
          }, options));
          running.push(own);
          own.findPreviousUploads().then(function (previous) {
            if (options.resumes && previous.length) {
              own.resumeFromPreviousUpload(previous[0]);
            }
            own.start();
          });
        });
      },
      pause: function () { running[0].abort(); },
      cancel: function () { return running[0].abort(true); },
      resume: function () { running[0].start(); },
    };
  },
};

function begin(library, url, options) {
  client = LIBRARIES[library](url, options);
}

// The library's own word for what a page does with the files that were chosen.
document.getElementById('files').addEventListener('change', function () {
  var chosen = Array.from(this.files);
  if (!chosen.length) return;
  this.value = '';
  client.add(chosen);
});

// A file that no <input> could give: its name is whatever the page says.
function addNamed(name, size) {
  client.add([new File([new Uint8Array(size).fill(7)], name)]);
}
